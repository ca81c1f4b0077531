"""Jacobians of samples, along all paths or along those that pass no point, by passes that may stop at points."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from dag_hesse.ir import CurvatureGraph, Point
from dag_hesse.sweep import Linearization
from dag_hesse.sweep.embed import to_tensor, to_vector
from dag_hesse.sweep.passes import pull, push

__all__ = ["dense_jacobians", "pull", "push", "tensor_of", "vector_of"]

_ROWS = 64  # unit vectors pulled back together


def tensor_of(graph: CurvatureGraph, site: int, z: Tensor) -> Tensor:
    """Vectors (probes, samples, dim) as a tensor (probes, *node)."""
    return to_tensor(z, graph.nodes[site].shape, graph.batch_axes[site], "each")


def vector_of(graph: CurvatureGraph, site: int, x: Tensor) -> Tensor:
    """A tensor (probes, *node) as vectors (probes, samples, dim)."""
    return to_vector(x, graph.nodes[site].shape, graph.batch_axes[site], "each")


def dense_jacobians(
    lin: Linearization, samples: int, target: Point, sources: Iterable[Point], stop: Collection[int] = ()
) -> dict[str, Tensor]:
    """Per source v that ``target`` u is reached from, J[u←v] of every sample (samples, d_u, d_v), in float64."""
    graph, site, sources = lin.graph, target.sites[0], list(sources)
    like = graph.nodes[site]
    eye = torch.eye(target.dim, dtype=like.dtype, device=lin.loss.device)[:, None, :].expand(-1, samples, -1)
    rows: dict[str, list[Tensor]] = {}
    for piece in eye.split(_ROWS):
        found = pull(lin, {site: tensor_of(graph, site, piece)}, {v.sites[0] for v in sources}, stop)
        for v in sources:
            if v.sites[0] in found:
                rows.setdefault(v.name, []).append(vector_of(graph, v.sites[0], found[v.sites[0]]).double())
    return {name: torch.cat(pieces).transpose(0, 1) for name, pieces in rows.items()}
