"""Directed paths between points, what each adds to a Jacobian and to a Gauss–Newton block (Theorems 33 and 65)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dag_hesse._capture.losses import Loss
from dag_hesse.errors import PointError, integer
from dag_hesse.theory.edge_maps import EdgeMaps, edge_maps
from dag_hesse.theory.path_search import Path, all_paths, number_of_paths, strength, strongest
from dag_hesse.theory.point_graph import point_graph
from dag_hesse.theory.scene import Names, pose, position_of
from dag_hesse.theory.text import table

Named = tuple[str, ...]


@dataclass(frozen=True)
class PathTerm:
    """One path of a Jacobian: ``strength`` is the root mean square over samples of ‖D_p‖_F, ``share`` that of
    ⟨D_p, J⟩/‖J‖², which adds up to 1 over all paths and is negative where a path works against the others."""

    path: Named
    strength: float
    share: float


@dataclass(frozen=True)
class StrongestPaths:
    """The strongest paths from v to w.

    Attributes:
        v, w: the ends.
        terms: the paths, strongest first.
        count: how many paths there are.
        proved: whether the search ended before its limit; else they are the strongest of those that were looked at.
        whole: strength of J[w←v] along all paths.
    """

    v: str
    w: str
    terms: tuple[PathTerm, ...]
    count: int
    proved: bool
    whole: float

    def __str__(self) -> str:
        rows = [(" → ".join(term.path), term.strength, term.share) for term in self.terms]
        head = f"{len(self.terms)} of {self.count} paths; all together {self.whole:.3g}"
        return f"{head}{'' if self.proved else ' (search cut short)'}\n{table(['path', 'strength', 'share'], rows)}"


@dataclass(frozen=True)
class PairTerm:
    """A pair of paths to out in a GN block: its influence D_pᵀ ∇²L D_q, (d_v, d_w), summed over samples as the block.

    ``resonance`` is its Frobenius norm (Definition 66), ``share`` ⟨influence, block⟩/‖block‖², which adds up to 1.
    """

    path_v: Named
    path_w: Named
    resonance: float
    share: float
    influence: Tensor = field(repr=False)


@dataclass(frozen=True)
class BlockPaths:
    """A GN block as a sum over pairs of paths.

    Attributes:
        v, w: the points.
        terms: pairs of paths, strongest first.
        pairs: how many pairs there are.
        block: H_GN[v, w], (d_v, d_w), from Jacobians along all paths.
        total_resonance: Σ resonance of ``terms``; at least ‖block‖_F where all pairs are there (Corollary 67).
        defect: ‖block − Σ influence‖_F/‖block‖_F: rounding if all pairs are there, else what the others add.
    """

    v: str
    w: str
    terms: tuple[PairTerm, ...]
    pairs: int
    block: Tensor = field(repr=False)
    total_resonance: float
    defect: float

    def __str__(self) -> str:
        rows = [(f"{' → '.join(t.path_v)} | {' → '.join(t.path_w)}", t.resonance, t.share) for t in self.terms[:20]]
        head = f"‖H_GN[{self.v}, {self.w}]‖_F = {float(self.block.norm()):.3g}, {len(self.terms)} of {self.pairs} pairs"
        return f"{head}, sum off by {self.defect:.1e}\n{table(['paths', 'resonance', 'share'], rows)}"


def strongest_paths(
    model: nn.Module,
    batch: Any,
    v: str,
    w: str = "out",
    *,
    k: int = 5,
    loss: Loss | None = None,
    output: str | None = None,
    points: Names = None,
    verify: str = "gradient",
) -> StrongestPaths:
    """The k strongest directed paths from v to w, D_p being the product of a path's Jacobians (paper, Theorem 33).

    Paths run through points, so name points inside branches to tell branches from skip connections. The search never
    lists all paths; it is exact unless ``proved`` says otherwise.

    Args:
        model, batch, loss, output, points, verify: as for :func:`dag_hesse.analyze`; out is added to the points.
        v, w: points; ``"out"`` is what the loss is a function of.
        k: how many paths.

    Returns:
        :class:`StrongestPaths`.

    Raises:
        PointError: there is no such point, or no path from v to w.
        MemoryBudgetError: the Jacobians of the edges do not fit.
        DagHesseError: as :func:`dag_hesse.theory.jacobian_norms`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         x = dh.tap(2 * x, "stem")
        ...         return x + dh.tap(0.1 * x, "branch")
        >>> batch = torch.ones(3, 2), torch.zeros(3, 2)
        >>> found = dh.theory.strongest_paths(Net(), batch, "stem", points=["stem", "branch"])
        >>> [(term.path, round(term.share, 3)) for term in found.terms]
        [(('stem', 'output'), 0.909), (('stem', 'branch', 'output'), 0.091)]
    """
    k = integer("k", k, 1)
    scene = pose(model, batch, loss=loss, output=output, points=points, verify=verify)
    i, j = position_of(scene, v), position_of(scene, w)
    count = number_of_paths(point_graph(scene.graph), i, j)
    if not count:
        raise PointError(f"no path leads from '{scene.names[i]}' to '{scene.names[j]}'.")
    maps = edge_maps(scene)
    paths, proved = strongest(maps, i, j, k)
    whole = maps.total(i)[j]
    norm = float(whole.pow(2).sum())
    terms = tuple(
        PathTerm(_named(maps, path), size, float((maps.along(path) * whole).sum()) / norm if norm else float("nan"))
        for size, path in paths
    )
    return StrongestPaths(scene.names[i], scene.names[j], terms, count, proved, strength(whole))


def block_paths(
    model: nn.Module,
    batch: Any,
    v: str,
    w: str,
    *,
    most: int = 1024,
    loss: Loss | None = None,
    output: str | None = None,
    points: Names = None,
    verify: str = "gradient",
) -> BlockPaths:
    """Write a GN block as a sum over pairs of paths to out (paper, Theorems 33 and 65, Definition 66).

    H_GN[v,w] = Σ_{p: v→out} Σ_{q: w→out} D_pᵀ ∇²L D_q. The paper's (11) sums over *all* common descendants c of v and
    w, with H[c,c] in the middle. That counts too much: H[c,c] holds already what lies behind c. Two points of a chain
    have several common descendants, and each alone gives the whole block. The sum over c = out is the right one.

    Args:
        model, batch, loss, output, points, verify: as for :func:`dag_hesse.analyze`; out is added to the points.
        v, w: points.
        most: pairs of paths that are formed. Where there are more, the √most strongest paths of either end are taken,
            and ``defect`` is what the rest adds.

    Returns:
        :class:`BlockPaths`: the block of ``batch_mode="shared"``.

    Raises:
        PointError: there is no such point.
        MemoryBudgetError: the Jacobians of the edges do not fit.
        DagHesseError: as :func:`dag_hesse.theory.jacobian_norms`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         x = dh.tap(2 * x, "stem")
        ...         return x + dh.tap(0.5 * x, "branch")
        >>> batch = torch.ones(3, 2), torch.zeros(3, 2)
        >>> found = dh.theory.block_paths(Net(), batch, "stem", "branch", points=["stem", "branch"])
        >>> [(term.path_v, round(term.share, 3)) for term in found.terms], found.defect < 1e-6
        ([(('stem', 'output'), 0.667), (('stem', 'branch', 'output'), 0.333)], True)
    """
    most = integer("most", most, 1)
    scene = pose(model, batch, loss=loss, output=output, points=points, verify=verify)
    ends = position_of(scene, v), position_of(scene, w)
    maps, out = edge_maps(scene), len(scene.points) - 1
    pairs = number_of_paths(maps.graph, ends[0], out) * number_of_paths(maps.graph, ends[1], out)
    sides = [_paths_to(maps, end, out, None if pairs <= most else max(1, int(most**0.5))) for end in ends]
    left, right = ({path: maps.along(path) for path in side} for side in sides)
    block = maps.block(*(maps.total(end)[out] for end in ends))
    norm, rest, terms = float(block.norm()), block.clone(), []
    for p, jacobian in left.items():
        for q, other in right.items():
            influence = maps.block(jacobian, other)
            rest -= influence
            share = float((influence * block).sum()) / norm**2 if norm else float("nan")
            terms.append(PairTerm(_named(maps, p), _named(maps, q), float(influence.norm()), share, influence))
    terms.sort(key=lambda term: -term.resonance)
    defect = float(rest.norm()) / norm if norm else 0.0
    total = sum(term.resonance for term in terms)
    return BlockPaths(scene.names[ends[0]], scene.names[ends[1]], tuple(terms), pairs, block, total, defect)


def _paths_to(maps: EdgeMaps, source: int, out: int, most: int | None) -> list[Path]:
    if most is None:
        return list(all_paths(maps.graph, source, out))
    return [path for _, path in strongest(maps, source, out, most)[0]]


def _named(maps: EdgeMaps, path: Path) -> Named:
    return tuple(maps.graph.names[k] for k in path)
