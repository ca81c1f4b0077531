"""By PyTorch's backward kernels, which read every row once; several small probes go together instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.machine import machine

aten = torch.ops.aten
_INPUT_ONLY = [True, False, False]  # what a norm's backward is to return


def _together(y: Tensor, g: Tensor) -> bool:
    """Whether one formula over all probes is less work than a kernel called for each."""
    return len(g) > 1 and y.numel() < machine(y.device).row_kernel


def less_mean(arena: Arena, x: Tensor, weights: Tensor, dims: list[int]) -> Tensor:
    """x − ⟨weights, x⟩, in the memory that the products took."""
    products = torch.mul(x, weights, out=arena.room(x, weights))
    return torch.sub(x, products.sum(dims, keepdim=True), out=products)


def softmax(arena: Arena, y: Tensor, g: Tensor, dims: list[int]) -> Tensor:
    if _together(y, g):
        return less_mean(arena, g, y, dims).mul_(y)
    found = arena.empty(g, *g.shape)
    for one, row in zip(g, found, strict=True):
        aten._softmax_backward_data.out(one, y, dims[0], g.dtype, grad_input=row)
    return found


def standardize(
    arena: Arena, y: Tensor, r: Tensor, g: Tensor, dims: list[int], center: bool, inner: Sequence[int] | None
) -> Tensor:
    if inner is None or _together(y, g):
        centered = g - g.mean(dims, keepdim=True) if center else g
        return torch.addcmul(centered, y, (y * g).mean(dims, keepdim=True), value=-1).mul_(r)
    zero, one = torch.zeros_like(r), torch.ones_like(r)  # mean and scale of y
    found = arena.empty(g, *g.shape)
    for x, row in zip(g, found, strict=True):
        project = aten.native_layer_norm_backward(x, y, inner, zero, one, None, None, _INPUT_ONLY)[0]
        torch.mul(project, r, out=row)
    return found
