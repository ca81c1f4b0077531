"""By PyTorch's backward kernels, which read every row once; several small probes go together instead."""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, added
from dag_hesse.kernels.elementwise.coefficients import times
from dag_hesse.kernels.machine import machine
from dag_hesse.kernels.rowwise.reference import Adjoint, Means, Pair, Tensors

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


def softmax_adjoints(arena: Arena, y: Tensor, a: Adjoint, dims: list[int]) -> Tensor:
    found = None if a.g is None else _softmax(arena, y, a.g, dims)
    if a.second is not None:
        mu, centered = a.second
        term = centered * mu
        term = added(term.addcmul_(y, term.sum(dims, keepdim=True), value=-1), _of(found, a.rows))
        found = term if found is None else found
    assert found is not None
    return added(found, a.into)


def log_softmax_tangent(arena: Arena, p: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    return _less_mean(arena, x, p, dims)


def log_softmax_adjoints(arena: Arena, p: Tensor, a: Adjoint, dims: list[int]) -> Tensor:
    found = None if a.g is None else (p * -a.g.sum(dims, keepdim=True)).add_(a.g)  # in p's layout
    if a.second is not None:
        total, moved = a.second
        term = added(times(arena, p, moved).mul_(-total), _of(found, a.rows))
        found = term if found is None else found
    assert found is not None
    return added(found, a.into)


def _standardized(arena: Arena, y: Tensor, r: Tensor, g: Tensor, how: Means) -> Tensor:
    if how.inner is None or _together(y, g):
        centered = g - g.mean(how.dims, keepdim=True) if how.center else g
        return torch.addcmul(centered, y, (y * g).mean(how.dims, keepdim=True), value=-1).mul_(r)
    zero, one = torch.zeros_like(r), torch.ones_like(r)  # mean and scale of y
    found = arena.empty(g, *g.shape)
    for x, row in zip(g, found, strict=True):
        project = aten.native_layer_norm_backward(x, y, how.inner, zero, one, None, None, _INPUT_ONLY)[0]
        torch.mul(project, r, out=row)
    return found


def standardize_tangent(arena: Arena, y: Tensor, r: Tensor, mu: Tensor | None, x: Tensor, how: Means) -> Tensors:
    moved = _standardized(arena, y, r, x, how)  # the Jacobian is symmetric
    if mu is None:
        return (moved,)
    return moved, -r * (y * x).mean(how.dims, keepdim=True), -r * (mu * x).mean(how.dims, keepdim=True)


def standardize_adjoints(arena: Arena, y: Tensor, r: Tensor, a: Adjoint, how: Means) -> Tensor:
    found = None if a.g is None else _standardized(arena, y, r, a.g, how)
    if a.second is not None:
        mu, overlap, moved, of_mu, of_y = a.second
        term = mu * of_mu if found is None else found[a.rows].addcmul_(mu, of_mu)
        term.addcmul_(moved, overlap).addcmul_(y, of_y)
        found = term if found is None else found
    assert found is not None
    return added(found, a.into)
