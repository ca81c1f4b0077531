"""Norms and distances: 0 has derivatives of 0, as in autograd's first ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from dag_hesse.rules.structural import axes

aten = torch.ops.aten
_MOST_DIFFERENCES = 1 << 26  # elements: more than that are not laid out


def rooted(x: Tensor, power: float = 0.5) -> Tensor:
    """x^power of sums of powers; where x is 0, derivatives are 0."""
    zero = x == 0
    positive = x.masked_fill(zero, 1.0)
    return (positive.sqrt() if power == 0.5 else positive.pow(power)).masked_fill(zero, 0.0)


def vector_norm(x: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """aten.linalg_vector_norm."""
    x, dims = (x if dtype is None else x.to(dtype)), axes(dim, x.ndim)
    if order == 2:
        return rooted((x * x).sum(dims, keepdim=keepdim))
    if order == 1:
        return x.abs().sum(dims, keepdim=keepdim)
    if order == 0:
        return (x != 0).to(x.dtype).sum(dims, keepdim=keepdim)
    if order in (inf, -inf):
        return (torch.amax if order > 0 else torch.amin)(x.abs(), dims, keepdim)
    total = x.abs().pow(order).sum(dims, keepdim=keepdim)
    return rooted(total, 1 / order) if order > 0 else total.pow(1 / order)


def _cdist(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    if p == 2 and prod(a.shape) * b.shape[-2] > _MOST_DIFFERENCES:
        square = (a * a).sum(-1, keepdim=True) + (b * b).sum(-1, keepdim=True).mT - 2 * (a @ b.mT)
        return rooted(square.relu())
    return vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, [-1])


def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    rows, columns = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device).unbind(0)
    return vector_norm(x.index_select(0, rows) - x.index_select(0, columns), p, [-1])


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    norm = vector_norm(v, 2, [k for k in range(v.ndim) if k != dim % v.ndim], True)
    return v * (g / norm), norm


LOWERINGS: Mapping[Any, Callable[..., Any]] = {
    aten.linalg_vector_norm.default: vector_norm,
    aten.dist.default: lambda a, b, p=2: vector_norm(a - b, p),
    aten._cdist_forward.default: _cdist,
    aten._euclidean_dist.default: _cdist,
    aten._pdist_forward.default: _pdist,
    aten._weight_norm_interface.default: _weight_norm,
}

__all__ = ["LOWERINGS", "rooted", "vector_norm"]
