"""By PyTorch's backward in evaluation mode, a row at a time: one pass over both operands."""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena

aten = torch.ops.aten


def refuse(g: Tensor, x: Tensor, mean: Tensor, r: Tensor, var: Tensor, eps: float) -> str | None:
    if g.device.type not in ("cpu", "meta"):
        return "PyTorch's CUDA kernel wants the statistics of training for some layouts"
    if g.shape[1] > 1 or (g.is_contiguous() and x.is_contiguous()):
        return None
    return "PyTorch's CPU kernel reads a single sample as if it were contiguous"


def sums(arena: Arena, g: Tensor, x: Tensor, mean: Tensor, r: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mask = [False, True, True]
    rows = [
        aten.native_batch_norm_backward(a, b, None, mean, var, None, None, False, eps, mask)[1:]
        for a, b in zip(*_rows(g, x), strict=True)
    ]
    turned, total = zip(*rows, strict=True)
    return torch.stack(turned), torch.stack(total)


def _rows(g: Tensor, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Both operands by rows, a single one repeated."""
    count = max(len(g), len(x))
    return list(g) * (count // len(g)), list(x) * (count // len(x))
