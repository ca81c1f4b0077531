"""Products of two tensors. Operands come with a leading probe axis, of size 1 where all probes share them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dag_hesse.ir.node import Node
from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.contraction import outer, product
from dag_hesse.kernels.machine import CPU
from dag_hesse.rules.base import Call, Rule, Run, Shapes, as_it_is
from dag_hesse.rules.bilinear import Terms, bilinear
from dag_hesse.rules.convolution import convolution


def _left(c: Call, g: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    return product(c.arena, g, b.mT, into)


def _right(c: Call, terms: Terms, into: Tensor | None) -> Tensor:
    # A weight comes in as a transposed view, and its adjoint is transposed next: laid out so that this is free.
    return outer(c.arena, terms, c.values[1].stride(-2) == 1, into)


def _mm_bias(node: Node, inputs: Sequence[Tensor], arena: Arena) -> Tensor:
    a, b, bias = inputs
    return torch.addmm(bias, a, b, out=arena.empty(a, len(a), b.shape[1]))


def _flops(node: Node, shapes: Shapes) -> int:
    return 2 * node.numel * shapes[0][-1]


def _unpooled(node: Node, shapes: Shapes, rows: int) -> int:
    """The largest of what oneDNN makes or copies: it is not the pool's, whose free memory it does not take."""
    if node.numel * shapes[0][-1] < CPU.onednn or node.dtype is not torch.float32:
        return 0
    return max(rows * node.numel, rows * prod(shapes[0]), prod(shapes[1])) * node.dtype.itemsize


def _mm(run: Run = as_it_is) -> Rule:
    return bilinear(
        lambda c, a, b, into: product(c.arena, a, b, into), _left, _right, run=run, flops=_flops, unpooled=_unpooled
    )


TABLE: dict[str, Rule] = {
    "aten.mm.default": _mm(),
    "aten.bmm.default": _mm(),
    "dag_hesse.mm_bias.default": _mm(_mm_bias),
    "aten.convolution.default": convolution,
}

__all__ = ["TABLE"]
