"""The definitions: PyTorch's convolution and its backward, a row at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, added
from dag_hesse.kernels.convolution.sizes import Geometry, crop

aten = torch.ops.aten


def _rows(*operands: Tensor) -> zip[tuple[Tensor, ...]]:
    count = max(map(len, operands))
    return zip(*(x.expand(count, *x.shape[1:]) for x in operands), strict=True)


def forward(arena: Arena, geo: Geometry, x: Tensor, w: Tensor, into: Tensor | None) -> Tensor:
    """The convolution of x (rows, batch, C, *S) by w (rows, O, C/groups, *K), added to ``into`` where that is given.

    An operand that all rows share has one; the weight may be cropped to the kernel taps that meet the input.
    """
    found = [aten.convolution(a, b, None, *geo.arguments) for a, b in _rows(x, crop(geo, w))]
    return added(torch.stack(found), into)


def input_transpose(arena: Arena, geo: Geometry, g: Tensor, w: Tensor, into: Tensor | None) -> Tensor:
    """What comes of g (rows, batch, O, *S') at the input."""
    found = []
    for a, b in _rows(g, crop(geo, w)):
        like = a.new_zeros(geo.batch, geo.channels, *geo.side)
        found.append(aten.convolution_backward(a, like, b, [0], *geo.arguments, [True, False, False])[0])
    return added(torch.stack(found), into)


def weight_transpose(
    arena: Arena, geo: Geometry, terms: Sequence[tuple[Tensor, Tensor]], into: Tensor | None
) -> Tensor:
    """Σ over ``terms`` (g, x) of what comes of g at the weight, zero where a kernel tap meets no input."""
    for g, x in terms:
        rows = []
        for a, b in _rows(g, x):
            a, b = a.contiguous(), b.contiguous()  # of channels that lie last, oneDNN's may be wrong (its issue 6035)
            whole = a.new_zeros(geo.weight)
            part = aten.convolution_backward(a, b, crop(geo, whole), [0], *geo.arguments, [False, True, False])[1]
            crop(geo, whole).copy_(part)
            rows.append(whole)
        found = torch.stack(rows)
        into = found if into is None else into.add_(found)
    assert into is not None
    return into
