"""Products of two tensors. Operands come with a leading probe axis, of size 1 where all probes share them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dag_hesse.ir.node import Node
from dag_hesse.kernels.arena import Arena
from dag_hesse.rules.base import Call, Rule, Run, Shapes, added, as_it_is
from dag_hesse.rules.bilinear import Terms, bilinear
from dag_hesse.rules.convolution import convolution

_LARGE = 1 << 20  # multiply-adds


def _matmul(arena: Arena, a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """Batched a @ b over (probes, …, n, k) and (probes, …, k, m), folding probes into rows where b has none."""
    if a.ndim == 3 and b.shape[0] == 1:
        rows = a.reshape(-1, a.shape[-1])
        if into is not None and into.is_contiguous():
            into.view(-1, b.shape[-1]).addmm_(rows, b[0])
            return into
        out = arena.empty(a, len(rows), b.shape[-1])
        return added(torch.mm(rows, b[0], out=out).view(*a.shape[:-1], b.shape[-1]), into)
    if a.ndim == 4 and b.shape[0] == 1 and a.shape[0] > 1:
        rows = a.transpose(0, 1).reshape(a.shape[1], -1, a.shape[-1])
        product = (rows @ b[0]).reshape(a.shape[1], a.shape[0], a.shape[2], -1).transpose(0, 1)
        return added(product, into)
    return _each(arena, a, b, into)


def _each(arena: Arena, a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """One product a probe, either operand possibly shared. Batched GEMMs of large matrices are slow on CPUs."""
    large = a.ndim == 3 and a.shape[1] * a.shape[2] * b.shape[2] >= _LARGE
    if not large or a.device.type != "cpu":
        return added(torch.matmul(a, b), into)
    out = arena.empty(a, max(len(a), len(b)), a.shape[1], b.shape[2]) if into is None else into
    for k, row in enumerate(out):
        pair = a[min(k, len(a) - 1)], b[min(k, len(b) - 1)]
        torch.mm(*pair, out=row) if into is None else row.addmm_(*pair)
    return out


def _left(c: Call, g: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    return _matmul(c.arena, g, b.mT, into)


def _right(c: Call, terms: Terms, into: Tensor | None) -> Tensor:
    # A weight comes in as a transposed view, and its cotangent is transposed next: lay it out so that this is free.
    turned = c.values[1].stride(-2) == 1
    for g, a in terms:
        if turned:
            into = _each(c.arena, g.mT, a, None if into is None else into.mT).mT
        else:
            into = _each(c.arena, a.mT, g, into)
    return into  # type: ignore[return-value]  # there is a term


def _mm_bias(node: Node, inputs: Sequence[Tensor], arena: Arena) -> Tensor:
    a, b, bias = inputs
    return torch.addmm(bias, a, b, out=arena.empty(a, len(a), b.shape[1]))


def _flops(node: Node, shapes: Shapes) -> int:
    return 2 * node.numel * shapes[0][-1]


def _mm(run: Run = as_it_is) -> Rule:
    return bilinear(lambda c, a, b, into: _matmul(c.arena, a, b, into), _left, _right, run=run, flops=_flops)


TABLE: dict[str, Rule] = {
    "aten.mm.default": _mm(),
    "aten.bmm.default": _mm(),
    "dag_hesse.mm_bias.default": _mm(_mm_bias),
    "aten.convolution.default": convolution,
}

__all__ = ["TABLE"]
