"""A Gauss–Newton block with edges taken out: what does this skip connection carry?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dag_hesse._capture.losses import Loss
from dag_hesse.errors import PointError, several
from dag_hesse.theory.edge_maps import Edge, edge_maps
from dag_hesse.theory.point_graph import PointGraph, point_graph
from dag_hesse.theory.scene import Names, Scene, pose, position_of


@dataclass(frozen=True)
class CutBlock:
    """H_GN[v, w] with and without some edges.

    Attributes:
        v, w: the points.
        edges: those taken out.
        block, without: H_GN[v, w] along all paths, and along those that pass no such edge, (d_v, d_w).
    """

    v: str
    w: str
    edges: tuple[tuple[str, str], ...]
    block: Tensor = field(repr=False)
    without: Tensor = field(repr=False)

    @property
    def carried(self) -> Tensor:
        """What the paths through those edges add, (d_v, d_w); a pair of paths counts if one of them passes."""
        return self.block - self.without

    @property
    def share(self) -> float:
        """‖carried‖_F/‖block‖_F; above 1 where what they carry cancels with the rest. NaN if the block is zero."""
        norm = float(self.block.norm())
        return float(self.carried.norm()) / norm if norm else float("nan")

    def __str__(self) -> str:
        edges = ", ".join(f"{v} → {u}" for v, u in self.edges)
        norms = f"{float(self.block.norm()):.3g}, without {edges}: {float(self.without.norm()):.3g}"
        return f"‖H_GN[{self.v}, {self.w}]‖_F = {norms}; carried: {self.share:.1%}"


def cut_edges(
    model: nn.Module,
    batch: Any,
    v: str,
    w: str,
    edges: Sequence[tuple[str, str]],
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Names = None,
    verify: str = "gradient",
) -> CutBlock:
    """H_GN[v, w] as if some edges between points let no derivative through (paper, Theorem 33, Remark 32).

    Values stay those of the whole model: this is a question about its present block, not about a model trained without
    the edge. An edge from a to b is all that leads from a to b past no other point. To cut a skip connection alone,
    name a point inside the branch that it goes round.

    Args:
        model, batch, loss, output, points, verify: as for :func:`dag_hesse.analyze`; out is added to the points.
        v, w: points.
        edges: pairs of points, from and to.

    Returns:
        :class:`CutBlock`: blocks of ``batch_mode="shared"``.

    Raises:
        PointError: there is no such point or edge.
        MemoryBudgetError: the Jacobians of the edges do not fit.
        DagHesseError: as :func:`dag_hesse.theory.jacobian_norms`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         x = dh.tap(2 * x, "stem")
        ...         return x + dh.tap(0.5 * x, "branch")
        >>> batch, points = (torch.ones(3, 2), torch.zeros(3, 2)), ["stem", "branch"]
        >>> found = dh.theory.cut_edges(Net(), batch, "stem", "branch", [("stem", "output")], points=points)
        >>> round(found.share, 3)
        0.667
    """
    scene = pose(model, batch, loss=loss, output=output, points=points, verify=verify)
    i, j, out = position_of(scene, v), position_of(scene, w), len(scene.points) - 1
    graph = point_graph(scene.graph)
    cut = [_edge(scene, graph, edge) for edge in several("edges", edges, "pairs of points, from and to")]
    maps = edge_maps(scene)
    block = maps.block(maps.total(i)[out], maps.total(j)[out])
    ends = [maps.total(end, without=set(cut)).get(out) for end in (i, j)]
    without = torch.zeros_like(block) if ends[0] is None or ends[1] is None else maps.block(ends[0], ends[1])
    names = tuple((scene.names[a], scene.names[b]) for a, b in cut)
    return CutBlock(scene.names[i], scene.names[j], names, block, without)


def _edge(scene: Scene, graph: PointGraph, edge: Any) -> Edge:
    if not (isinstance(edge, (tuple, list)) and len(edge) == 2):
        raise PointError(f"{edge!r} is no edge; expected two points, from and to.")
    found = position_of(scene, edge[0]), position_of(scene, edge[1])
    if found not in graph.edges:
        below = ", ".join(repr(graph.names[u]) for u in graph.children[found[0]])
        raise PointError(
            f"no edge leads from {edge[0]!r} to {edge[1]!r}; from there, edges lead to {below or 'no point'}."
        )
    return found
