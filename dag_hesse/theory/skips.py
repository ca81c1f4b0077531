"""Where to put a few skip connections into a chain, from measured norms (paper, Proposition 75)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, exp, log
from numbers import Real

from dag_hesse.errors import OptionError, integer, kind_of

Skip = tuple[int, int]
_MOST = 50_000  # placements that are tried


@dataclass(frozen=True)
class SkipPlacement:
    """Skip connections for a chain of points 0 … L.

    Attributes:
        skips: (from, to) of each, by the points' numbers.
        worst: the product of norms along the strongest path between the two points that are worst off.
        uniform: the paper's placement, one behind the other with step ⌊L/B⌋.
        uniform_worst: the same measure of that.
        plain_worst: the same without skip connections.
    """

    skips: tuple[Skip, ...]
    worst: float
    uniform: tuple[Skip, ...]
    uniform_worst: float
    plain_worst: float

    def __str__(self) -> str:
        def show(skips: Iterable[Skip]) -> str:
            return ", ".join(f"{a} → {b}" for a, b in skips)

        return (
            f"best: {show(self.skips)}; weakest pair {self.worst:.3g}\n"
            f"uniform: {show(self.uniform)}; weakest pair {self.uniform_worst:.3g}\n"
            f"none: weakest pair {self.plain_worst:.3g}"
        )


def skip_placement(rho: Sequence[float], budget: int) -> SkipPlacement:
    """Place identity skip connections where the weakest pair of points gains most, by trying all placements.

    A pair's strength is the largest product of norms over directed paths between them, a skip connection counting 1. It
    is what the paper's argument for Proposition 75 uses. It is a model: paths also interfere (Remark 72), and norms of
    products are below products of norms. Check what comes out with :func:`~dag_hesse.analyze`.

    Proposition 75 says that uniform placement, one skip behind the other with step k = ⌊L/B⌋, is optimal and leaves
    min R ≥ C·ρ^(L/B). Both are false in this model, also for equal norms. Two points inside different spans walk to the
    ends of theirs: of 6 layers with skips 0 → 3 → 6, points 1 and 5 are 4 plain layers apart, not 3. The placement
    1 → 3, 3 → 5 leaves no pair further apart than 2.

    Args:
        rho: norms of the L edges of the chain, ρ(i+1←i), as :func:`~dag_hesse.theory.jacobian_norms` measures them.
        budget: how many skip connections, B.

    Returns:
        :class:`SkipPlacement`.

    Raises:
        OptionError: norms are not positive, ``budget`` is not between 1 and L, or there are over 50 000 placements.

    Examples:
        >>> import dag_hesse as dh
        >>> found = dh.theory.skip_placement([0.5] * 6, 2)
        >>> found.skips, found.worst, found.uniform, found.uniform_worst
        (((1, 3), (3, 5)), 0.25, ((0, 3), (3, 6)), 0.0625)
    """
    logs, length = _logs(rho), len(rho)
    budget = integer("budget", budget, 1)
    if budget > length:
        raise OptionError(f"budget={budget} skip connections for {length} layers; expected at most as many as layers.")
    spans = [(a, b) for a in range(length) for b in range(a + 2, length + 1)]
    many = comb(len(spans), min(budget, len(spans)))
    if many > _MOST:
        raise OptionError(
            f"{budget} skip connections over {length} layers have {many} placements; at most {_MOST} are tried."
        )
    step = length // budget
    uniform = tuple((k * step, (k + 1) * step) for k in range(budget)) if step > 1 else ()
    tried = ((_weakest(logs, skips), skips) for skips in combinations(spans, min(budget, len(spans))))
    worst, skips = max(tried, key=lambda one: one[0])
    return SkipPlacement(skips, exp(worst), uniform, exp(_weakest(logs, uniform)), exp(_weakest(logs, ())))


def _logs(rho: Sequence[float]) -> list[float]:
    if not isinstance(rho, Sequence) and not hasattr(rho, "__array__"):
        raise OptionError(f"rho is {kind_of(rho)}; expected the positive norms of a chain's edges.")
    if isinstance(rho, str) or not all(isinstance(x, Real) and float(x) > 0 for x in rho) or not len(rho):
        raise OptionError("rho: expected the positive norms of a chain's edges, one or more.")
    return [log(float(x)) for x in rho]


def _weakest(logs: Sequence[float], skips: Iterable[Skip]) -> float:
    """Least over pairs i < j of the largest sum of logarithms on a path from i to j."""
    into: dict[int, list[int]] = {}
    for a, b in skips:
        into.setdefault(b, []).append(a)
    least = float("inf")
    for start in range(len(logs)):
        best = [0.0]
        for k in range(start + 1, len(logs) + 1):
            ways = [best[-1] + logs[k - 1], *(best[a - start] for a in into.get(k, ()) if a >= start)]
            best.append(max(ways))
            least = min(least, best[-1])
    return least
