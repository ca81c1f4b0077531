"""Reports of one model over time: checkpoints of a training run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dag_hesse.errors import OptionError, PointError, choose, is_integer, kind_of, several
from dag_hesse.estimate import METRICS
from dag_hesse.report.pairs import data_frame
from dag_hesse.report.report import CurvatureReport

Array = NDArray[np.float64]
_MOST_LINES = 10  # of a plot


@dataclass(frozen=True)
class ReportSeries:
    """Reports over the same points, in order; made by :func:`dag_hesse.concat`.

    Attributes:
        reports: the reports.
        steps: where each belongs on the axis of time, ascending: steps, epochs or whatever was given.
    """

    reports: tuple[CurvatureReport, ...]
    steps: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.reports)

    def __iter__(self) -> Iterator[CurvatureReport]:
        return iter(self.reports)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the points."""
        return self.reports[0].names

    def __getitem__(self, key: Any) -> Any:
        """``series["resonance"]``: values (time, n, n); ``series[v, w]``: a list of pairs' figures; ``series[k]``: a
        report; ``series[1:3]``: a series.

        Raises:
            OptionError: there is no such metric or report.
            PointError: there is no such point.
        """
        if isinstance(key, slice):
            return concat(self.reports[key], steps=self.steps[key])
        if is_integer(key):
            if not -len(self) <= int(key) < len(self):
                raise OptionError(f"series[{int(key)}]; expected the number of one of {len(self)} reports.")
            return self.reports[int(key)]
        if isinstance(key, str):
            return np.stack([report[key] for report in self.reports])
        return [report[key] for report in self.reports]

    def stderr(self, metric: str) -> Array:
        """Standard errors (time, n, n) of a metric.

        Raises:
            OptionError: there is no such metric.
        """
        choose("metric", metric, METRICS)
        return np.stack([report.stderr[metric] for report in self.reports])

    def rows(self) -> list[dict[str, Any]]:
        """The reports' rows one behind the other, each with its ``step``."""
        return [{"step": step, **row} for step, report in zip(self.steps, self, strict=True) for row in report.rows()]

    def to_dataframe(self) -> Any:
        """:meth:`rows` as a pandas DataFrame.

        Raises:
            DependencyError: pandas is not installed.
        """
        return data_frame(self.rows())

    def plot(self, metric: str = "resonance", pairs: Sequence[Sequence[str | int]] | None = None) -> Any:
        """A metric of pairs over time with bands of two standard errors, as a matplotlib Figure (extra: ``plot``).

        Args:
            metric: what is drawn.
            pairs: which pairs [(v, w), …]; None: the diagonal blocks, at most ten, evenly spread.

        Raises:
            OptionError: there is no such metric, or ``pairs`` is no list of pairs.
            PointError: there is no such point.
            DependencyError: matplotlib is not installed.
        """
        from dag_hesse.report.plots import over_time

        choose("metric", metric, METRICS)
        first = self.reports[0]
        if pairs is None:
            count = min(len(first), _MOST_LINES)
            places = [(k, k) for k in np.unique(np.linspace(0, len(first) - 1, count).round().astype(int)).tolist()]
        elif isinstance(pairs, str) or not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs):
            raise OptionError(f"pairs={pairs!r}; expected a list of pairs (v, w).")
        else:
            places = [(first.index(v), first.index(w)) for v, w in pairs]
        return over_time(self, metric, places)


def concat(reports: Iterable[CurvatureReport], steps: Iterable[float] | None = None) -> ReportSeries:
    """Put reports of one model in a row: checkpoints of a training run.

    Args:
        reports: reports with the same points, or a dict of them by step.
        steps: a number for each, all different; None: 0, 1, 2, …

    Raises:
        OptionError: there are none, one is no report, steps are no numbers, or too many, too few or twice the same.
        PointError: they have other points than the first.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> batch = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
        >>> reports = {step: dh.analyze(net, batch, points=["0", "1"]) for step in (0, 100)}
        >>> series = dh.concat(reports)
        >>> series["resonance"].shape, series.steps
        ((2, 2, 2), (0, 100))
    """
    if isinstance(reports, Mapping):
        steps, reports = (reports.keys() if steps is None else steps), reports.values()
    if isinstance(reports, CurvatureReport) or not isinstance(reports, Iterable):
        raise OptionError(f"concat() got {kind_of(reports)}; expected a list of reports.")
    found = tuple(several("reports", reports, "a list of reports"))
    for report in found:
        if not isinstance(report, CurvatureReport):
            raise OptionError(f"concat() got a list with {kind_of(report)}; expected reports.")
    times = tuple(range(len(found)) if steps is None else several("steps", steps, "a number for each report"))
    numbers = all(isinstance(step, Real) and not isinstance(step, bool) for step in times)
    if not found or not numbers or len(times) != len(found) or len(set(times)) < len(times):
        raise OptionError(f"{len(found)} reports at steps {list(times)[:6]}; expected one different number for each.")
    for report in found[1:]:
        if report.names != found[0].names:
            raise PointError(
                f"a report has points {list(report.names)[:4]}, the first {list(found[0].names)[:4]}: analyze all "
                "checkpoints with the same points=."
            )
    order = sorted(range(len(times)), key=lambda k: times[k])
    return ReportSeries(tuple(found[k] for k in order), tuple(times[k] for k in order))
