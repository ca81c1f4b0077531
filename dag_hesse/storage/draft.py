"""What the routes hand on: bases and cores of all pairs that are not proved zero, and their errors by probes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dag_hesse.storage.bounds import PROBES, spread
from dag_hesse.storage.cores import Cores, Pair
from dag_hesse.storage.orthonormal import orthonormal
from dag_hesse.storage.source import Source


@dataclass
class Draft:
    """Approximation of a whole matrix before it is trimmed.

    Attributes:
        cores: its numbers.
        route: ``"exact"``, ``"gram"``, ``"one pass"`` or ``"two passes"``.
        rows: per point, estimate of ‖(H − approximation)[v, :]‖_F; 0.0 where exact.
        size: ‖H‖_F, estimated where the route is not exact.
        history: (directions, relative error) after each doubling of the sketch.
        pullbacks: of the Gram route, half a sweep each.
    """

    cores: Cores
    route: str
    rows: list[float]
    size: float
    history: list[tuple[int, float]] = field(default_factory=list)
    pullbacks: int = 0

    def bound(self, pair: Pair) -> float:
        """On ‖(approximation − H)[v, w]‖_F: a block is no larger than its row, and exact between unit vectors."""
        if self.route != "one pass" and all(self.cores.bases[k] is None for k in pair):
            return 0.0
        return spread() * min(self.rows[k] for k in pair)


def exact(cores: Cores, route: str = "exact", pullbacks: int = 0) -> Draft:
    """A draft without error."""
    squares = {pair: cores.norm(*pair) ** 2 for pair in cores.cores}
    size = sum(x if v == w else 2 * x for (v, w), x in squares.items()) ** 0.5
    return Draft(cores, route, [0.0] * len(cores.dims), size, pullbacks=pullbacks)


class Holdouts:
    """Products with probes that take no part in building, to measure what was built (:mod:`.bounds`)."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.products = source.products(self.probes)
        squares = [float(y.double().pow(2).sum()) for y in self.products]
        self.size = (sum(squares) / PROBES) ** 0.5

    @property
    def probes(self) -> list[Tensor]:
        """The probes, drawn anew: keeping them would take as much memory as their products."""
        return self.source.probes(0, PROBES, holdout=True)

    def errors(self, found: list[Tensor]) -> list[float]:
        """Per point, the estimate of ‖E[v, :]‖_F from the approximation's products with the probes."""
        off = [(y - x).double().pow(2).sum() for x, y in zip(found, self.products, strict=True)]
        return [float(x / PROBES) ** 0.5 for x in off]


def total(rows: list[float]) -> float:
    """Norm of a matrix from those of its rows."""
    return sum(x * x for x in rows) ** 0.5


def from_factors(source: Source, factors: list[Tensor], signs: Tensor) -> Cores:
    """H[v, w] = F_vᵀ Σ F_w with factors (groups, R, d_v) and Σ (groups, R), brought to bases and cores.

    ``factors`` is used up: bases take its place one by one.
    """
    dims, shorts = source.dims, list[Tensor]()
    bases: list[Tensor | None] = []
    for v, dim in enumerate(dims):
        f, factors[v] = factors[v], signs  # let go
        if f.shape[1] >= dim:
            bases.append(None)
            shorts.append(f)
            continue
        basis, triangle = orthonormal(f.mT)
        bases.append(basis)
        shorts.append(triangle.mT)
    cores = {(v, w): core(shorts[v].mT @ (signs.unsqueeze(-1) * shorts[w]), v, w) for v, w in source.pairs()}
    return Cores(dims, source.groups, bases, cores)


def core(x: Tensor, v: int, w: int) -> Tensor:
    """A pair's core; the diagonal's is made symmetric to the bit."""
    return (x + x.mT) / 2 if v == w else x


def two_passes(source: Source, bases: list[Tensor | None]) -> Cores:
    """Q_vᵀ H[v, w] Q_w of all pairs, by a sweep from w for each direction at w; H[v, w] itself between unit vectors."""
    dims, cores = source.dims, dict[Pair, Tensor]()
    partners = [tuple(v for v in range(w + 1) if source.alive[v, w]) for w in range(len(dims))]
    ranks = [d if b is None else b.shape[-1] for d, b in zip(dims, bases, strict=True)]
    expected, done = sum(r for r, reads in zip(ranks, partners, strict=True) if reads), 0
    empty = Cores(dims, source.groups, bases, {})
    for w, reads in enumerate(partners):
        if not reads:
            continue
        basis, rows = bases[w], dict[int, list[Tensor]]({v: [] for v in reads})
        probes = source.unit_vectors(w) if basis is None else basis.permute(2, 0, 1)
        for piece in probes.split(4 * source.problem.chunk):  # compressed before the next are swept
            for v, y in zip(reads, source.blocks(w, piece, reads), strict=True):
                rows[v].append(empty.compress(v, y))
            done += len(piece)
            source.tell("blocks", done, expected)
        for v in reads:
            cores[v, w] = core(torch.cat(rows[v], dim=1).mT.contiguous(), v, w)
    return Cores(dims, source.groups, bases, cores)
