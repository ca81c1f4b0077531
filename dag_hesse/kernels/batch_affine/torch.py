"""By PyTorch: sums by its backward in evaluation mode, a row at a time, in one pass over both operands."""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.batch_affine.reference import spread
from dag_hesse.kernels.elementwise.coefficients import add_times, plus_times, times

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


def tangent(
    arena: Arena, gain: Tensor, xdot: Tensor | None, x: Tensor, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    gain, ndim = spread(gain[None], x.ndim + 1), x.ndim + 1
    total = None if shift is None else spread(shift, ndim)
    if scale is not None and total is not None:
        place = arena.room(x[None]) if len(scale) == 1 else None
        total = torch.addcmul(total, x, spread(scale, ndim), out=place)
    elif scale is not None:
        total = x * spread(scale, ndim)
    if xdot is None:
        assert total is not None
        return total.expand(len(total), *x.shape)
    if total is None:
        return times(arena, gain, xdot)
    own = total.shape == xdot.shape  # then it is a new tensor
    return add_times(arena, total, gain, xdot) if own else plus_times(arena, total, gain, xdot)


def adjoint(
    arena: Arena, gain: Tensor, abar: Tensor | None, lam: Tensor | None, share: Tensor | None, rows: slice
) -> Tensor:
    if abar is None:
        assert lam is not None and share is not None
        return lam * spread(share, lam.ndim)
    found = times(arena, spread(gain[None], abar.ndim), abar)
    if lam is not None and share is not None:
        found[rows].addcmul_(lam, spread(share, lam.ndim))
    return found
