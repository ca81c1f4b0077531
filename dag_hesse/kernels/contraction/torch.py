"""By the vendor's products: rows folded into one where the other operand is shared, large ones one by one on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, added
from dag_hesse.kernels.contraction.by_product import outer_by
from dag_hesse.kernels.machine import machine


def product(arena: Arena, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    if a.ndim == 3 and b.shape[0] == 1:
        rows = a.reshape(-1, a.shape[-1])
        if into is not None and into.is_contiguous():
            into.view(-1, b.shape[-1]).addmm_(rows, b[0])
            return into
        out = arena.empty(a, len(rows), b.shape[-1])
        return added(torch.mm(rows, b[0], out=out).view(*a.shape[:-1], b.shape[-1]), into)
    if a.ndim == 4 and b.shape[0] == 1 and a.shape[0] > 1:
        rows = a.transpose(0, 1).reshape(a.shape[1], -1, a.shape[-1])
        found = (rows @ b[0]).reshape(a.shape[1], a.shape[0], a.shape[2], -1).transpose(0, 1)
        return added(found, into)
    return _each(arena, a, b, into)


def _each(arena: Arena, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    """One product a row, where batched ones are slow."""
    if a.ndim != 3 or a.shape[1] * a.shape[2] * b.shape[2] < machine(a.device).product:
        return added(torch.matmul(a, b), into)
    out = arena.empty(a, max(len(a), len(b)), a.shape[1], b.shape[2]) if into is None else into
    for k, row in enumerate(out):
        pair = a[min(k, len(a) - 1)], b[min(k, len(b) - 1)]
        torch.mm(*pair, out=row) if into is None else row.addmm_(*pair)
    return out


outer = outer_by(_each)
