"""Between vectors of a point and tensors of its nodes: the three meanings of the batch axis (design §2.3).

Vectors are (probes, groups, dim). ``"sum"``: one vector for all samples, read as the sum over samples (one group).
``"each"``: one vector per sample (a group each). ``"whole"``: one vector, sample behind sample (one group).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dag_hesse.ir import BatchAxis, CurvatureGraph, Kind, Point
from dag_hesse.sweep.engine import Adjoint, Read

EMBEDDINGS = ("sum", "each", "whole")


def _factors(shape: Sequence[int], batch_axis: BatchAxis) -> tuple[int, int, int, int, int]:
    before, after = prod(shape[: batch_axis.axis]), prod(shape[batch_axis.axis + 1 :])
    return before, batch_axis.outer, batch_axis.batch, batch_axis.inner, after


def to_tensor(z: Tensor, shape: Sequence[int], batch_axis: BatchAxis | None, embedding: str) -> Tensor:
    """Vectors (probes, groups, dim) -> perturbation (probes, *shape)."""
    probes = z.shape[0]
    if batch_axis is None:
        return z.reshape(probes, *shape)
    before, outer, batch, inner, after = _factors(shape, batch_axis)
    if embedding == "sum":
        spread = z.reshape(probes, before, outer, 1, inner, after)
        return spread.expand(-1, -1, -1, batch, -1, -1).reshape(probes, *shape)
    each = z.reshape(probes, batch, before, outer, inner, after)
    return each.permute(0, 2, 3, 1, 4, 5).reshape(probes, *shape)


def to_vector(x: Tensor, shape: Sequence[int], batch_axis: BatchAxis | None, embedding: str) -> Tensor:
    """Adjoint (probes, *shape) -> vectors (probes, groups, dim): the transpose of :func:`to_tensor`."""
    probes = x.shape[0]
    if batch_axis is None:
        return x.reshape(probes, 1, prod(shape))
    before, outer, batch, inner, after = _factors(shape, batch_axis)
    if embedding == "sum" and outer == inner == 1:
        return x.sum(1 + batch_axis.axis).reshape(probes, 1, -1)  # as x lies in memory
    split = x.reshape(probes, before, outer, batch, inner, after)
    if embedding == "sum":
        return split.sum(3).reshape(probes, 1, prod(shape) // batch)
    groups = 1 if embedding == "whole" else batch
    return split.permute(0, 3, 1, 2, 4, 5).reshape(probes, groups, prod(shape) // groups)


def seed(graph: CurvatureGraph, point: Point, z: Tensor, embedding: str) -> dict[int, Tensor]:
    """Perturbations of a point's nodes: the same at all calls of a module, consecutive pieces for joined parameters."""
    if point.kind == "activation":
        return {k: to_tensor(z, graph.nodes[k].shape, graph.batch_axes[k], embedding) for k in point.sites}
    sizes = [graph.nodes[k].numel for k in point.sites]
    pieces = z.split(sizes, dim=-1)
    return {
        k: to_tensor(piece, graph.nodes[k].shape, None, embedding) for k, piece in zip(point.sites, pieces, strict=True)
    }


def reader(graph: CurvatureGraph, embedding: str) -> Read:
    """What a sweep is to keep of the adjoint of a node that it reads: vectors (probes, groups, dim)."""

    def read(k: int, x: Tensor) -> Tensor:
        node = graph.nodes[k]
        return to_vector(x, node.shape, None if node.kind is Kind.PARAM else graph.batch_axes[k], embedding)

    return read


def joined(graph: CurvatureGraph, point: Point, found: dict[int, Tensor], like: Tensor, embedding: str) -> Tensor:
    """Vectors of a point from those of its nodes; missing nodes count as zero."""
    keep, zero = reader(graph, embedding), like.new_zeros(1)
    vectors = [
        found[k] if k in found else keep(k, zero.expand(like.shape[0], *graph.nodes[k].shape)) for k in point.sites
    ]
    if len(vectors) == 1:
        return vectors[0]
    return torch.cat(vectors, dim=-1) if point.kind == "parameter" else torch.stack(vectors).sum(0)


def read_parts(
    graph: CurvatureGraph, point: Point, found: dict[int, Adjoint], like: Tensor, embedding: str
) -> tuple[Tensor | None, Tensor | None]:
    """(GN, T) vectors of a point after a sweep with :func:`reader`; None for a part that nothing reached."""
    parts: list[Tensor | None] = []
    for channel in (0, 1):
        data = {k: part for k in point.sites if k in found and (part := found[k].parts[channel]) is not None}
        parts.append(joined(graph, point, data, like, embedding) if data else None)
    return parts[0], parts[1]
