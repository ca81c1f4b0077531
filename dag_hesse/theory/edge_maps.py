"""Jacobians of all edges between points, and ∇²L: what sums over paths are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dag_hesse.budget import human
from dag_hesse.errors import MemoryBudgetError
from dag_hesse.estimate.gram import loss_hessian
from dag_hesse.measure import available_memory
from dag_hesse.theory.passes import dense_jacobians
from dag_hesse.theory.point_graph import PointGraph, point_graph
from dag_hesse.theory.scene import Scene

Edge = tuple[int, int]


@dataclass(frozen=True)
class EdgeMaps:
    """The point graph with numbers, all in float64.

    Attributes:
        graph: which points follow which.
        dims: their sizes.
        maps: per edge (v, u), D[u←v] of every sample, (B, d_u, d_v).
        core: ∇²L of every sample with its weight in the loss, (B, C, C): blocks are sums over samples.
    """

    graph: PointGraph
    dims: tuple[int, ...]
    maps: Mapping[Edge, Tensor]
    core: Tensor

    def total(self, source: int, without: Collection[Edge] = ()) -> dict[int, Tensor]:
        """J[u←source] along all paths but those through some edges, (B, d_u, d_source), per point u that is reached."""
        eye = torch.eye(self.dims[source], dtype=self.core.dtype, device=self.core.device)
        found = {source: eye.expand(len(self.core), -1, -1)}
        for v in range(source, len(self.dims)):
            for u in self.graph.children[v] if v in found else ():
                if (v, u) not in without:
                    step = self.maps[v, u] @ found[v]
                    found[u] = found[u] + step if u in found else step
        return found

    def along(self, path: tuple[int, ...]) -> Tensor:
        """D_p, the product of a path's edges, (B, d_last, d_first)."""
        eye = torch.eye(self.dims[path[0]], dtype=self.core.dtype, device=self.core.device)
        found = eye.expand(len(self.core), -1, -1)
        for edge in pairwise(path):
            found = self.maps[edge] @ found
        return found

    def block(self, left: Tensor, right: Tensor) -> Tensor:
        """Σ_b left_bᵀ ∇²L_b right_b, (d_v, d_w), of Jacobians to out."""
        return torch.einsum("bcv,bcd,bdw->vw", left, self.core, right)


def edge_maps(scene: Scene) -> EdgeMaps:
    """Pull unit vectors back along every edge.

    Raises:
        MemoryBudgetError: the matrices do not fit.
    """
    graph, dims = point_graph(scene.graph), tuple(point.dim for point in scene.points)
    need = 8 * scene.problem.groups * sum(dims[v] * dims[u] for v, u in graph.edges)
    if need > available_memory(scene.problem.device) // 4:
        raise MemoryBudgetError(
            f"the Jacobians of {len(graph.edges)} edges need {human(need)}: take fewer samples, or points of "
            "fewer dimensions."
        )
    shares = scene.problem.reduction.shares(scene.problem.batches.sizes)
    maps: dict[Edge, list[Tensor]] = {edge: [] for edge in graph.edges}
    cores = []
    for entry, lin in scene.linearizations():
        sites = {point.sites[0] for point in entry.points}
        for u, target in enumerate(entry.points):
            above = [v for v, w in graph.edges if w == u]
            found = dense_jacobians(lin, entry.groups, target, [entry.points[v] for v in above], sites) if above else {}
            for v in above:
                zero = torch.zeros(entry.groups, dims[u], dims[v], dtype=torch.float64, device=lin.loss.device)
                maps[v, u].append(found.get(entry.points[v].name, zero))
        cores.append(
            loss_hessian(entry.graph, lin, scene.problem.chunk, lin.loss.device).double() * shares[entry.batch]
        )
    return EdgeMaps(graph, dims, {edge: torch.cat(pieces) for edge, pieces in maps.items()}, torch.cat(cores))
