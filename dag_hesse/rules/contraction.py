"""Products of two tensors. Operands come with a leading probe axis, of size 1 where all probes share them."""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.rules.base import Call, Rule, bilinear

aten = torch.ops.aten
_LARGE = 1 << 20  # multiply-adds


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched a @ b over (probes, …, n, k) and (probes, …, k, m), folding probes into rows where b has none."""
    if a.ndim == 3 and b.shape[0] == 1:
        return (a.reshape(-1, a.shape[-1]) @ b[0]).reshape(*a.shape[:-1], b.shape[-1])
    if a.ndim == 4 and b.shape[0] == 1 and a.shape[0] > 1:
        rows = a.transpose(0, 1).reshape(a.shape[1], -1, a.shape[-1])
        return (rows @ b[0]).reshape(a.shape[1], a.shape[0], a.shape[2], -1).transpose(0, 1)
    return _each(a, b)


def _each(a: Tensor, b: Tensor) -> Tensor:
    """One product a probe, either operand possibly shared. Batched GEMMs of large matrices are slow on CPUs."""
    large = a.ndim == 3 and a.shape[1] * a.shape[2] * b.shape[2] >= _LARGE
    if not large or a.device.type != "cpu":
        return torch.matmul(a, b)
    out = a.new_empty(max(len(a), len(b)), a.shape[1], b.shape[2])
    for k, row in enumerate(out):
        torch.mm(a[min(k, len(a) - 1)], b[min(k, len(b) - 1)], out=row)
    return out


def _left(c: Call, g: Tensor, b: Tensor) -> Tensor:
    return _matmul(g, b.mT)


def _right(c: Call, g: Tensor, a: Tensor) -> Tensor:
    # A weight comes in as a transposed view, and its cotangent is transposed next: lay it out so that this is free.
    if c.values[1].stride(-2) == 1:
        return _each(g.mT, a).mT
    return _each(a.mT, g)


_mm = bilinear(lambda c, a, b: _matmul(a, b), _left, _right)


def _geometry(c: Call) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    stride, padding, dilation, transposed, output_padding, groups = c.node.args[3:9]
    return stride, padding, dilation, transposed, output_padding, groups


def _fold(x: Tensor) -> Tensor:
    """(probes, batch, …) -> (probes·batch, …)."""
    return x.reshape(-1, *x.shape[2:])


def _convolve(c: Call, x: Tensor, w: Tensor) -> Tensor:
    if w.shape[0] == 1:
        y = aten.convolution(_fold(x), w[0], None, *_geometry(c))
        return y.reshape(x.shape[0], -1, *y.shape[1:])
    if x.shape[0] == 1:
        return torch.vmap(lambda k: aten.convolution(x[0], k, None, *_geometry(c)))(w)
    return torch.vmap(lambda v, k: aten.convolution(v, k, None, *_geometry(c)))(x, w)


def _backward(c: Call, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> Tensor:
    return aten.convolution_backward(g, x, w, [0], *_geometry(c), mask)[0 if mask[0] else 1]


def _convolution_left(c: Call, g: Tensor, w: Tensor) -> Tensor:
    shape = c.shape(0)
    if w.shape[0] == 1:
        folded = _fold(g)
        like = folded.new_empty(folded.shape[0], *shape[1:])  # only its shape is read
        return _backward(c, folded, like, w[0], [True, False, False]).reshape(g.shape[0], *shape)
    like = g.new_empty(shape)
    if g.shape[0] == 1:
        return torch.vmap(lambda k: _backward(c, g[0], like, k, [True, False, False]))(w)
    return torch.vmap(lambda u, k: _backward(c, u, like, k, [True, False, False]))(g, w)


def _convolution_right(c: Call, g: Tensor, x: Tensor) -> Tensor:
    like = g.new_empty(c.shape(1))
    probes = max(g.shape[0], x.shape[0])
    # Each probe's weight cotangent is a convolution of its own: there is nothing to fold.
    parts = [
        _backward(c, g[min(k, g.shape[0] - 1)], x[min(k, x.shape[0] - 1)], like, [False, True, False])
        for k in range(probes)
    ]
    return torch.stack(parts)


TABLE: dict[str, Rule] = {
    "aten.mm.default": _mm,
    "aten.bmm.default": _mm,
    "aten.convolution.default": bilinear(_convolve, _convolution_left, _convolution_right),
}

__all__ = ["TABLE"]
