"""How resonance, coupling and stable rank fall with distance (paper, Exp. 1), and how far layers interact (Def. 79)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dag_hesse.errors import OptionError, choose, integer
from dag_hesse.report import CurvatureReport
from dag_hesse.storage.pairs import radius_by_rate
from dag_hesse.theory.scene import check_report, fraction
from dag_hesse.theory.text import table

Array = NDArray[np.float64]
_METRICS = ("resonance", "coupling", "stable_rank", "gn_norm", "tensor_norm")


@dataclass(frozen=True)
class DecayFit:
    """log M̄(d) ≈ intercept + slope · d, where M̄(d) is the mean of a metric over the pairs at distance d.

    Attributes:
        metric: its name.
        distance: the distances d ≥ 0 at which there is a positive mean, (k,).
        mean: M̄(d), (k,).
        pairs: how many unordered pairs each mean is of, (k,).
        slope, intercept: of the least-squares line.
        r_squared: the share of the variance of log M̄(d) that the line explains; NaN where the means are all equal.
        interval: of the slope, from resampled pairs, (low, high).
        level: the share of resamples inside.
    """

    metric: str
    distance: NDArray[np.int64]
    mean: Array
    pairs: NDArray[np.int64]
    slope: float
    intercept: float
    r_squared: float
    interval: tuple[float, float]
    level: float

    @property
    def rate(self) -> float:
        """The factor from one distance to the next, exp(slope)."""
        return float(np.exp(self.slope))

    def __str__(self) -> str:
        low, high = self.interval
        rows = [
            (str(d), m, int(k))
            for d, m, k in zip(self.distance.tolist(), self.mean.tolist(), self.pairs.tolist(), strict=True)
        ]
        line = (
            f"slope {self.slope:.3g} [{low:.3g}, {high:.3g}] a step (factor {self.rate:.3g}), R² = {self.r_squared:.3f}"
        )
        return f"{table(['distance', self.metric, 'pairs'], rows)}\n{line}"


def decay_fit(
    report: CurvatureReport, metric: str = "resonance", *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> DecayFit:
    """Fit a metric's mean over the pairs at each distance with an exponential: R̄(d), C̄(d), D̄(d) of the paper's Exp. 1.

    The interval is the bootstrap's: pairs are drawn anew, with replacement, among those at the same distance. It says
    how much the pairs of this one model scatter. Pairs share points, so it is no statement about other models.

    Args:
        report: of :func:`dag_hesse.analyze`.
        metric: ``"resonance"``, ``"coupling"``, ``"stable_rank"``, ``"gn_norm"`` or ``"tensor_norm"``.
        resamples: of the bootstrap.
        level: of the interval.
        seed: of the bootstrap.

    Returns:
        :class:`DecayFit`. Zero blocks count in means; distances whose mean is zero have no logarithm and are left out.

    Raises:
        OptionError: unknown metric, or fewer than two distances with a positive mean.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> layers = [layer for _ in range(4) for layer in (torch.nn.Linear(5, 5), torch.nn.Tanh())]
        >>> report = dh.analyze(torch.nn.Sequential(*layers), (torch.randn(6, 5), torch.randint(0, 3, (6,))))
        >>> fit = dh.theory.decay_fit(report)
        >>> fit.distance.tolist(), fit.interval[0] <= fit.slope <= fit.interval[1]
        ([0, 1, 2], True)
    """
    check_report(report)
    choose("metric", metric, _METRICS)
    resamples, seed, level = integer("resamples", resamples, 1), integer("seed", seed, 0), fraction("level", level)
    groups = _by_distance(report, metric)
    if len(groups) < 2:
        raise OptionError(
            f"{metric} is positive at {len(groups)} distance(s), and a line needs two: take points further apart."
        )
    distance, means = np.array(list(groups)), np.array([values.mean() for values in groups.values()])
    slope, intercept, r_squared = _line(distance, np.log(means))
    slopes = _resampled(groups, resamples, np.random.default_rng(seed))
    low, high = np.quantile(slopes, [(1 - level) / 2, (1 + level) / 2])
    pairs = np.array([len(values) for values in groups.values()])
    return DecayFit(metric, distance, means, pairs, slope, intercept, r_squared, (float(low), float(high)), level)


def _by_distance(report: CurvatureReport, metric: str) -> dict[int, Array]:
    """Values of unordered pairs, NaN left out, at every distance where some are positive."""
    upper = np.triu_indices(len(report.points))
    values, distance = report.values[metric][upper], report.distance[upper]
    known = ~np.isnan(values) & (distance >= 0)
    found = {int(d): values[known & (distance == d)] for d in np.unique(distance[known])}
    return {d: each for d, each in found.items() if each.mean() > 0}


def _line(x: Array, y: Array) -> tuple[float, float, float]:
    slope, intercept = np.polyfit(x, y, 1)
    spread = ((y - y.mean()) ** 2).sum()
    left = ((y - slope * x - intercept) ** 2).sum()
    return float(slope), float(intercept), float(1 - left / spread) if spread > 0 else float("nan")


def _resampled(groups: dict[int, Array], count: int, generator: np.random.Generator) -> Array:
    """Slopes of lines through means of resampled pairs; a resample of zeros alone at some distance has none."""
    distance = np.array(list(groups), dtype=float)
    means = np.stack([generator.choice(v, (count, len(v))).mean(axis=1) for v in groups.values()], axis=1)
    logs = np.log(means[(means > 0).all(axis=1)])
    centered = distance - distance.mean()
    return np.asarray(logs @ centered / (centered @ centered))


def interaction_radius(report: CurvatureReport, epsilon: float, rate: float | None = None) -> int | None:
    """k_ε: blocks further apart than this are negligible (paper, Definition 79).

    Without ``rate`` it is measured: the least k such that R(v,w) < ε min(R(v,v), R(w,w)) for all pairs at a distance
    above k. With ``rate`` it is the paper's formula, the least k with C·rate^k < ε R(v,v) for all v, C being the
    largest R(v,v); ``rate`` is sρ of :func:`~dag_hesse.theory.resonance_bounds` or :attr:`DecayFit.rate`. The paper
    takes C of out, and bounds GN parts alone; C of the largest diagonal block makes it an extrapolation of a map.

    Args:
        report: of :func:`dag_hesse.analyze`.
        epsilon: relative size of what is negligible, between 0 and 1.
        rate: factor from one distance to the next.

    Returns:
        A number of points passed. None: with a rate of 1 or more, or where some R(v,v) is zero, there is no such k.

    Raises:
        OptionError: ``epsilon`` is not between 0 and 1, or ``rate`` is not positive.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> report = dh.analyze(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["0", "1"])
        >>> dh.theory.interaction_radius(report, 1e-9)
        1
    """
    epsilon = fraction("epsilon", epsilon)
    own = report.resonance.diagonal()
    if rate is None:
        allowed = epsilon * np.minimum(own[:, None], own[None, :])
        strong = (report.resonance > 0) & (report.resonance >= allowed)
        return int(report.distance[strong].max(initial=0))
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
        raise OptionError(f"rate={rate!r}; expected a positive number.")
    return radius_by_rate(own, epsilon, rate)
