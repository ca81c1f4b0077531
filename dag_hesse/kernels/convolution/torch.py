"""By the vendor's convolutions and by matrix products: the shapes decide.

On a CPU activations lie channels last, so that matrix products and elementwise ops need no copies; where the weight is
the larger operand, the vendor's kernels get them otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.contraction import product
from dag_hesse.kernels.convolution.probes import add, apart, beside, fold, with_weight
from dag_hesse.kernels.convolution.sizes import Geometry
from dag_hesse.kernels.layout import laid_out

aten = torch.ops.aten
Terms = Sequence[tuple[Tensor, Tensor]]


def _stacked(arena: Arena, rows: Sequence[Tensor]) -> Tensor:
    """Weights one behind the other, contiguous whatever their own layout: so vectors have them."""
    return torch.stack(list(rows), out=arena.empty(rows[0], len(rows), *rows[0].shape))


def _rows(x: Tensor) -> Tensor:
    """(batch, c, *S) -> (batch·S, c)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _grid(rows: Tensor, side: tuple[int, ...]) -> Tensor:
    """(batch·S, c) -> (batch, c, *S): the inverse of :func:`_rows`."""
    return rows.reshape(-1, *side, rows.shape[1]).movedim(-1, 1)


def _patches(geo: Geometry, x: Tensor) -> Tensor:
    """(batch, C, *side) -> (batch·out, C·kernel): what each output reads."""
    if geo.unit:
        return _rows(x[geo.strided])
    columns = F.unfold(x, geo.kernel, geo.dilation, geo.padding, geo.stride)
    return columns.mT.reshape(-1, columns.shape[1])


def _spread(geo: Geometry, rows: Tensor) -> Tensor:
    """(batch·out, C) -> (batch, C, *side): the transpose of :func:`_patches` where outputs read one position."""
    inner = _grid(rows, geo.out)
    if geo.out == geo.side:
        return inner
    x = rows.new_zeros(len(inner), *geo.side, rows.shape[1]).movedim(-1, 1)
    x[geo.strided] = inner
    return x


def _times(arena: Arena, a: Tensor, b: Tensor) -> Tensor:
    return product(arena, a[None], b[None], None)[0]


def _forward(arena: Arena, geo: Geometry, x: Tensor, w: Tensor) -> Tensor:
    if geo.is_matrix(len(x)):
        return _grid(_times(arena, _patches(geo, x), w.reshape(w.shape[:2]).T), geo.out)
    y = aten.convolution(laid_out(arena, x, geo.inside(len(x))), w, None, *geo.arguments)
    return laid_out(arena, y, geo.outside)


def _input_transpose(arena: Arena, geo: Geometry, g: Tensor, w: Tensor) -> Tensor:
    if geo.is_matrix(len(g)):
        return _spread(geo, _times(arena, _rows(g), w.reshape(w.shape[:2])))
    layout, channels = geo.inside(len(g)), w.shape[0] if geo.transposed else w.shape[1] * geo.groups
    g = laid_out(arena, g, layout)
    like = torch.empty(len(g), channels, *geo.side, dtype=g.dtype, device=g.device, memory_format=layout)  # a shape
    x = aten.convolution_backward(g, like, w, [0], *geo.arguments, [True, False, False])[0]
    return laid_out(arena, x, geo.outside)


def _weight_transpose(arena: Arena, geo: Geometry, terms: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Of the sum of convolutions with adjoints g and inputs x, ``terms`` = [(g, x), …]."""
    if len(terms) > 1 and not geo.joins:
        return sum(
            (_weight_transpose(arena, geo, [term]) for term in terms[1:]),
            start=_weight_transpose(arena, geo, terms[:1]),
        )
    layout, arguments = geo.inside(sum(len(g) for g, _ in terms)), geo.arguments
    if geo.unit:
        # Positions that meet no other are left out here: where oneDNN does so, of few channels that lie last, it writes
        # beyond its memory or is wrong (its issue 6035).
        terms = [(g[geo.strided], x) if geo.transposed else (g, x[geo.strided]) for g, x in terms]
        ones, zeros = [1] * len(geo.stride), [0] * len(geo.stride)
        arguments = (ones, zeros, ones, geo.transposed, zeros, geo.groups)
    sides = [[laid_out(arena, t, layout) for t in side] for side in zip(*terms, strict=True)]
    g, x = (side[0] if len(side) == 1 else torch.cat(side) for side in sides)
    inner, outer = x.shape[1] // geo.groups, g.shape[1]
    shape = (inner * geo.groups, outer // geo.groups) if geo.transposed else (outer, inner)
    like = g.new_empty(*shape, *geo.kernel)  # only its shape is read
    return aten.convolution_backward(g, x, like, [0], *arguments, [False, True, False])[1]


def forward(arena: Arena, geo: Geometry, x: Tensor, w: Tensor, into: Tensor | None) -> Tensor:
    return with_weight(arena, geo, x, w, into, _forward, fold)


def input_transpose(arena: Arena, geo: Geometry, g: Tensor, w: Tensor, into: Tensor | None) -> Tensor:
    return with_weight(arena, geo, g, w, into, _input_transpose, beside)


def weight_transpose(arena: Arena, geo: Geometry, terms: Terms, into: Tensor | None) -> Tensor:
    probes = max(len(t) for term in terms for t in term)
    if probes > 1 and geo.folds and all(len(g) == 1 or len(x) == 1 for g, x in terms):
        for g, x in terms:
            into = add(arena, geo, _folded(arena, geo, g, x), into)
        return into  # type: ignore[return-value]  # there is a term
    if geo.is_patches(geo.batch * (len(terms) if geo.joins else 1)):
        return add(arena, geo, _of_patches(arena, geo, terms, probes), into)
    rows = [
        _weight_transpose(arena, geo, [tuple(t[min(k, len(t) - 1)] for t in term) for term in terms])
        for k in range(probes)
    ]
    return add(arena, geo, _stacked(arena, rows), into)


def _of_patches(arena: Arena, geo: Geometry, terms: Terms, probes: int) -> Tensor:
    """:func:`_weight_transpose` of all probes as one batch of matrix products."""

    def side(tensors: Sequence[Tensor], lay: Callable[[Tensor], Tensor]) -> Tensor:
        laid = [lay(fold(t)).unflatten(0, (len(t), -1)).expand(probes, -1, -1) for t in tensors]
        return laid[0] if len(laid) == 1 else torch.cat(laid, dim=1)

    g, x = (list(tensors) for tensors in zip(*terms, strict=True))
    left, right = side(g, _rows).mT, side(x, lambda t: _patches(geo, t))
    found = product(arena, left, right, None)
    return found.reshape(probes, *geo.weight[:2], *geo.kernel)


def _folded(arena: Arena, geo: Geometry, g: Tensor, x: Tensor) -> Tensor:
    """Weight adjoints of several probes as one: those of the output's, or of the input, side by side."""
    if len(x) == 1:
        return _weight_transpose(arena, geo, [(beside(g), x[0])]).unflatten(0, (len(g), -1))
    return apart(_weight_transpose(arena, geo, [(g[0], beside(x))]), len(x))
