"""Which blocks are stored, and what is known of each pair of points: kind, reason, norm, error."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from dag_hesse.errors import OptionError
from dag_hesse.storage.cores import Cores, Pair
from dag_hesse.storage.options import Wanted


class Storage(str, Enum):
    """How a block is stored."""

    DENSE = "dense"
    LOW_RANK = "low-rank"
    ZERO = "zero"
    LIVE = "live"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class PairFacts:
    """Of one pair v ≤ w.

    Attributes:
        kind: how the block is stored.
        reason: why it is zero or live; empty else.
        distance: points passed on the way from v to w.
        norm: ‖H[v, w]‖_F as stored, or as measured where it is not.
        error: bound on the Frobenius norm of what is stored minus the block; ``norm`` included, where it is dropped.
    """

    kind: Storage
    reason: str
    distance: int
    norm: float
    error: float


def band_width(
    wanted: Wanted, distance: NDArray[np.int64], norms: dict[Pair, float], bounds: dict[Pair, float], size: float
) -> int | None:
    """The largest distance that is kept; None where all are (paper, Corollary 78 and Definition 79).

    Raises:
        OptionError: nothing is left.
    """
    far = int(distance.max(initial=0))
    if isinstance(wanted.band, int):
        chosen: int | None = wanted.band
    elif wanted.eps is not None:
        chosen = radius(wanted.eps, distance, norms, bounds)
    elif wanted.band == "error":
        allowed = 0.25 * ((wanted.error or 0.0) * size) ** 2
        chosen = next(k for k in range(far + 1) if dropped_square(distance, norms, bounds, k) <= allowed or k == far)
    else:
        chosen = None
    check_band(distance, list(norms), chosen)
    return chosen


def check_band(distance: NDArray[np.int64], alive: list[Pair], band: int | str | None) -> None:
    """Whether anything is stored.

    Raises:
        OptionError: nothing is.
    """
    if not alive:
        raise OptionError("nothing is left to store: this part is proved zero for every pair of these points.")
    if isinstance(band, int) and not any(distance[pair] <= band for pair in alive):
        least = min(int(distance[pair]) for pair in alive)
        raise OptionError(
            f"band={band} leaves no block: those that are not proved zero have distances from {least} on."
        )


def radius(eps: float, distance: NDArray[np.int64], norms: dict[Pair, float], bounds: dict[Pair, float]) -> int:
    """k_ε as measured: every block beyond is below ε times both its points' diagonal blocks (Definition 79)."""

    def counts(pair: Pair) -> bool:
        own = min(norms.get((k, k), 0.0) for k in pair)
        return norms[pair] + bounds[pair] >= eps * own

    return max((int(distance[pair]) for pair in norms if pair[0] != pair[1] and counts(pair)), default=0)


def radius_by_rate(own: NDArray[np.float64], eps: float, rate: float) -> int | None:
    """k_ε by the paper's formula: the least k with C·rate^k < ε·R(v,v) for all v, C being the largest R(v,v).

    None: with a rate of 1 or more, or where some R(v,v) is zero, there is no such k.
    """
    if rate >= 1 or not own.min() > 0:
        return None
    return int(np.floor(np.log(eps * own.min() / own.max()) / np.log(rate))) + 1


def decay_rate(pairs: dict[Pair, PairFacts]) -> float | None:
    """Factor from one distance to the next of the mean norm, by a line through its logarithms; None: no line."""
    norms: dict[int, list[float]] = {}
    for facts in pairs.values():
        if facts.distance >= 0:
            norms.setdefault(facts.distance, []).append(facts.norm)
    means = {d: float(np.mean(x)) for d, x in norms.items() if any(x)}
    return float(np.exp(np.polyfit(list(means), np.log(list(means.values())), 1)[0])) if len(means) > 1 else None


def dropped_square(
    distance: NDArray[np.int64], norms: dict[Pair, float], bounds: dict[Pair, float], band: int
) -> float:
    """Bound on the squared Frobenius norm of what lies beyond a distance, both triangles."""
    return sum(2 * (x + bounds[pair]) ** 2 for pair, x in norms.items() if distance[pair] > band)


def kind_of(cores: Cores, v: int, w: int) -> Storage:
    """Dense between points that keep their coordinates, low-rank else."""
    return Storage.DENSE if cores.bases[v] is None and cores.bases[w] is None else Storage.LOW_RANK
