"""Convolution: its row, and the layouts in which its operands are kept."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dag_hesse.ir.node import Node, execute
from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.convolution import (
    CHANNELS_LAST,
    Geometry,
    crop,
    forward,
    geometry,
    input_transpose,
    weight_transpose,
)
from dag_hesse.kernels.layout import laid_out
from dag_hesse.rules.base import Call, Samples, Shapes
from dag_hesse.rules.bilinear import bilinear


def _of(c: Call) -> Geometry:
    # A GPU's kernels take either layout, and elementwise ones want one: there the model's own is kept.
    last = not (c.value.is_cuda and c.value.is_contiguous())
    return geometry(c.shape(0), c.shape(1), c.value.shape, c.node.args, last)


def _kept(c: Call, slot: int, value: Tensor) -> Tensor:
    """An operand as the products like it, (1, …): weights cropped to their kernel taps, activations in their layout."""
    geo = _of(c)
    if slot == 1:
        return crop(geo, value).contiguous()[None]
    layout = geo.outside if geo.is_matrix(len(value)) else geo.inside(len(value))  # a matrix product takes whole rows
    return laid_out(c.arena, value, layout)[None]


def _run(node: Node, inputs: Sequence[Tensor], arena: Arena) -> Tensor:
    """As the model itself runs it, to the bit, so that every ReLU decides as it does there; laid out for the sweeps."""
    x, *rest = inputs
    if x.is_cuda:  # layouts are algorithms there, which round each in their own way
        return execute(node, inputs)
    y = execute(node, [laid_out(arena, x, torch.contiguous_format), *rest])
    return laid_out(arena, y, CHANNELS_LAST.get(y.ndim - 2, torch.contiguous_format))


def _flops(node: Node, shapes: Shapes) -> int:
    geo = geometry(shapes[0], shapes[1], node.shape, node.args)
    positions = prod(shapes[0]) if geo.transposed else node.numel
    return 2 * positions * prod(geo.kernel) * shapes[1][1]


def _workspace(node: Node, shapes: Shapes, rows: int) -> int:
    """The layouts of its own that the vendor's kernel copies into: all operands of the op itself, one of a product."""
    geo, size = geometry(shapes[0], shapes[1], node.shape, node.args), node.dtype.itemsize
    if not rows:
        return (node.numel + prod(shapes[0]) + prod(shapes[1])) * size
    weight = 0 if geo.is_matrix(geo.batch) else prod(shapes[1][:2]) * prod(geo.kernel)
    return max(rows * node.numel, rows * prod(shapes[0]), weight) * size


convolution = bilinear(
    lambda c, x, w, into: forward(c.arena, _of(c), x, w, into),
    lambda c, g, w, into: input_transpose(c.arena, _of(c), g, w, into),
    lambda c, terms, into: weight_transpose(c.arena, _of(c), terms, into),
    _kept,
    _run,
    lambda call: not _of(call).joins,
    samples=Samples.CONVOLUTION,
    flops=_flops,
    workspace=_workspace,
)

__all__ = ["convolution"]
