"""By PyTorch's backward kernels, which read every row once; several small probes go together instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, added
from dag_hesse.kernels.elementwise.coefficients import times
from dag_hesse.kernels.machine import machine
from dag_hesse.kernels.rowwise.reference import Pair, Tensors

aten = torch.ops.aten
_INPUT_ONLY = [True, False, False]  # what a norm's backward is to return


def _together(y: Tensor, g: Tensor) -> bool:
    """Whether one formula over all probes is less work than a kernel called for each."""
    return len(g) > 1 and y.numel() < machine(y.device).row_kernel


def _less_mean(arena: Arena, x: Tensor, weights: Tensor, dims: list[int]) -> Tensor:
    """x − ⟨weights, x⟩, in the memory that the products took."""
    products = torch.mul(x, weights, out=arena.room(x, weights))
    return torch.sub(x, products.sum(dims, keepdim=True), out=products)


def _of(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def softmax_tangent(arena: Arena, y: Tensor, x: Tensor, dims: list[int]) -> Pair:
    centered = _less_mean(arena, x, y, dims)
    return y * centered, centered


def _softmax(arena: Arena, y: Tensor, g: Tensor, dims: list[int]) -> Tensor:
    if _together(y, g):
        return _less_mean(arena, g, y, dims).mul_(y)
    found = arena.empty(g, *g.shape)
    for one, row in zip(g, found, strict=True):
        aten._softmax_backward_data.out(one, y, dims[0], g.dtype, grad_input=row)
    return found


def softmax_adjoints(
    arena: Arena, y: Tensor, g: Tensor | None, second: Pair | None, rows: slice, dims: list[int], into: Tensor | None
) -> Tensor:
    found = None if g is None else _softmax(arena, y, g, dims)
    if second is not None:
        mu, centered = second
        term = centered * mu
        term = added(term.addcmul_(y, term.sum(dims, keepdim=True), value=-1), _of(found, rows))
        found = term if found is None else found
    assert found is not None
    return added(found, into)


def log_softmax_tangent(arena: Arena, p: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    return _less_mean(arena, x, p, dims)


def log_softmax_adjoints(
    arena: Arena, p: Tensor, g: Tensor | None, second: Pair | None, rows: slice, dims: list[int], into: Tensor | None
) -> Tensor:
    found = None if g is None else (p * -g.sum(dims, keepdim=True)).add_(g)  # in p's layout
    if second is not None:
        total, moved = second
        term = added(times(arena, p, moved).mul_(-total), _of(found, rows))
        found = term if found is None else found
    assert found is not None
    return added(found, into)


def _standardized(
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


def standardize_tangent(
    arena: Arena,
    y: Tensor,
    r: Tensor,
    mu: Tensor | None,
    x: Tensor,
    dims: list[int],
    center: bool,
    inner: Sequence[int] | None,
) -> Tensors:
    moved = _standardized(arena, y, r, x, dims, center, inner)  # the Jacobian is symmetric
    if mu is None:
        return (moved,)
    return moved, -r * (y * x).mean(dims, keepdim=True), -r * (mu * x).mean(dims, keepdim=True)


def standardize_adjoints(
    arena: Arena,
    y: Tensor,
    r: Tensor,
    g: Tensor | None,
    second: Tensors | None,
    rows: slice,
    dims: list[int],
    center: bool,
    inner: Sequence[int] | None,
    into: Tensor | None,
) -> Tensor:
    found = None if g is None else _standardized(arena, y, r, g, dims, center, inner)
    if second is not None:
        mu, overlap, moved, of_mu, of_y = second
        term = mu * of_mu if found is None else found[rows].addcmul_(mu, of_mu)
        term.addcmul_(moved, overlap).addcmul_(y, of_y)
        found = term if found is None else found
    assert found is not None
    return added(found, into)
