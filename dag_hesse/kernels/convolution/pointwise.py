"""Convolutions of one kernel tap as matrix products, image by image, where channels lie one behind the other.

A GPU's convolutions reach 10 to 40 TFLOP/s in float32 where an output reads one position; matrix products of the same
operands, as they lie, reach 30 to 80.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, added
from dag_hesse.kernels.contraction import product
from dag_hesse.kernels.convolution.probes import add, beside, fold, with_weight
from dag_hesse.kernels.convolution.sizes import Geometry
from dag_hesse.kernels.machine import machine
from dag_hesse.measure import rounds_to_tf32


def _refuse(geo: Geometry, *operands: Tensor) -> str | None:
    if not geo.unit or not geo.plain:
        return "outputs read several positions, or channels are in groups"
    if geo.is_matrix(max(map(len, operands)) * geo.batch):
        return "the weight is the larger operand"
    if any(x.dtype is not torch.float32 for x in operands):
        return "it was measured in float32 alone"
    if any(not x.is_contiguous() for x in operands):
        return "the positions of a channel do not lie side by side"
    if operands[0].is_cuda and rounds_to_tf32(convolutions=True):
        return "TF32 is allowed, and the vendor's convolutions use it"
    least = machine(operands[0].device).image
    return None if prod(geo.out) >= least else f"images have fewer than {least} positions"


def refuse_forward(geo: Geometry, x: Tensor, w: Tensor, into: Tensor | None) -> str | None:
    return _refuse(geo, x) if prod(geo.stride) == 1 else "a product would read a copy"


def refuse_input_transpose(geo: Geometry, g: Tensor, w: Tensor, into: Tensor | None) -> str | None:
    return _refuse(geo, g)


def refuse_weight_transpose(geo: Geometry, terms: Sequence[tuple[Tensor, Tensor]], into: Tensor | None) -> str | None:
    return _refuse(geo, *(x for term in terms for x in term))


def _product(arena: Arena, w: Tensor, x: Tensor) -> Tensor:
    """w (O, C) times each image of x (n, C, positions)."""
    return product(arena, w.expand(1, len(x), *w.shape), x[None], None)[0]


def _forward(arena: Arena, geo: Geometry, x: Tensor, w: Tensor) -> Tensor:
    return _product(arena, w.flatten(1), x.flatten(2)).unflatten(-1, geo.out)


def _input_transpose(arena: Arena, geo: Geometry, g: Tensor, w: Tensor) -> Tensor:
    read = _product(arena, w.flatten(1).mT, g.flatten(2)).unflatten(-1, geo.out)
    if geo.out == geo.side:
        return read
    found = read.new_zeros(*read.shape[:2], *geo.side)
    found[geo.strided] = read
    return found


def _weight_transpose(arena: Arena, geo: Geometry, g: Tensor, x: Tensor) -> Tensor:
    """(1, O, C, *K) of (1, n, O, *S') and (1, n, C, *S): a sum of images' products, or one product of all positions."""
    g, x = g.flatten(3), x[geo.strided].flatten(3)
    outputs, channels, positions = g.shape[2], x.shape[2], x.shape[3]
    if outputs * channels <= 4 * (outputs + channels) * positions:  # what is summed is not much larger than operands
        found = product(arena, g, x.mT, None).sum(1)
    else:
        g, x = (t.transpose(1, 2).reshape(1, t.shape[2], -1) for t in (g, x))
        found = product(arena, g, x.mT, None)
    return found.view(*found.shape, *geo.kernel)


forward = partial(with_weight, run=_forward, aside=fold)
input_transpose = partial(with_weight, run=_input_transpose, aside=beside)


def weight_transpose(
    arena: Arena, geo: Geometry, terms: Sequence[tuple[Tensor, Tensor]], into: Tensor | None
) -> Tensor:
    found: Tensor | None = None
    for g, x in terms:
        rows = [
            _weight_transpose(arena, geo, *(t[min(k, len(t) - 1)][None] for t in (g, x)))
            for k in range(max(len(g), len(x)))
        ]
        found = added(torch.cat(rows) if len(rows) > 1 else rows[0], found)
    assert found is not None
    return add(arena, geo, found, into)


__all__ = [
    "forward",
    "input_transpose",
    "refuse_forward",
    "refuse_input_transpose",
    "refuse_weight_transpose",
    "weight_transpose",
]
