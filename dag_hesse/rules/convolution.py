"""Convolution, and how each of its products is computed: the shapes decide.

Kernel taps that only ever read padding are left out. What remains of a large weight is often 1×1: that is a matrix
product, which reads the weight once and never reorders it. Activations lie channels last, so that matrix products and
elementwise ops need no copies; where the weight is the larger operand, the vendor's kernels get them otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dag_hesse.ir.node import Node, execute
from dag_hesse.kernels.arena import Arena
from dag_hesse.rules.base import Call, Samples, Shapes, added
from dag_hesse.rules.bilinear import Product, Terms, bilinear

aten = torch.ops.aten
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class Geometry:
    """A convolution's sizes: input (batch, C, *S), weight (O, C/groups, *K), output (batch, O, *S').

    ``taps`` is, per spatial axis, the part of the kernel that meets the input; ``padding`` is what is left of the
    padding once the other taps are gone.
    """

    batch: int
    channels: int
    side: tuple[int, ...]
    weight: tuple[int, ...]
    out: tuple[int, ...]
    taps: tuple[slice, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the part of the kernel that meets the input."""
        return tuple(tap.stop - tap.start for tap in self.taps)

    @property
    def live(self) -> Any:
        """Index of that part in (…, *K)."""
        return (..., *self.taps)

    @property
    def plain(self) -> bool:
        """Whether the weight is one block, outputs by inputs."""
        return self.groups == 1 and not self.transposed

    @property
    def folds(self) -> bool:
        """Whether weights of several probes are better laid side by side than taken one by one: small ones are."""
        return self.plain and self.batch * prod(self.out) > self.weight[0]

    @property
    def joins(self) -> bool:
        """Whether a sum of two weight adjoints is better one of twice the batch: small activations are."""
        read = self.batch * (self.channels * prod(self.side) + self.weight[0] * prod(self.out))
        return read <= 8 * prod(self.weight[:2]) * prod(self.kernel)

    @property
    def unit(self) -> bool:
        """Whether every output reads one position of the input."""
        return all(k == 1 and p == 0 for k, p in zip(self.kernel, self.padding, strict=True))

    def is_matrix(self, batch: int) -> bool:
        """Whether a product with ``batch`` samples (probes counted) is a matrix product with a larger weight."""
        return self.unit and self.plain and batch * prod(self.out) <= self.weight[0]

    def is_patches(self, batch: int) -> bool:
        """Whether a weight adjoint is a matrix product with patches of the input, laid out for it: few ones are."""
        few = 4 * batch * prod(self.out) <= self.weight[0]
        return self.is_matrix(batch) or (few and self.plain and len(self.side) == 2)

    @property
    def outside(self) -> torch.memory_format:
        """Memory format that all activations have in common."""
        return _CHANNELS_LAST.get(len(self.side), torch.contiguous_format)

    def inside(self, batch: int) -> torch.memory_format:
        """Memory format that the vendor's kernels like: channels last where the weight is not the larger operand."""
        wide = batch * prod(self.out) >= 4 * self.weight[0]
        return self.outside if wide else torch.contiguous_format

    @property
    def strided(self) -> Any:
        """Index of the positions that a kernel of one tap reads, in (…, *S)."""
        return (..., *(slice(None, None, s) for s in self.stride))

    @property
    def arguments(self) -> tuple[object, ...]:
        """What ``aten.convolution`` takes after the bias."""
        lists = [list(v) for v in (self.stride, self.padding, self.dilation, self.output_padding)]
        return lists[0], lists[1], lists[2], self.transposed, lists[3], self.groups


def _live(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[slice, int]:
    """The taps that some output reads the input through, and the padding in front of the first of them."""
    reads = [any(0 <= o * stride - padding + t * dilation < size for o in range(out)) for t in range(kernel)]
    first, last = reads.index(True), kernel - reads[::-1].index(True)
    rest = padding - first * dilation
    same = rest >= 0 and (size + 2 * rest - dilation * (last - first - 1) - 1) // stride + 1 == out
    return (slice(first, last), rest) if same else (slice(0, kernel), padding)


@cache
def _geometry(x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], *rest: object) -> Geometry:
    stride, padding, dilation, transposed, output_padding, groups = rest
    dims = len(w) - 2
    wide = [tuple(v) * (dims // len(v)) for v in (stride, padding, dilation, output_padding)]  # type: ignore[arg-type]
    taps = [(slice(0, k), p) for k, p in zip(w[2:], wide[1], strict=True)]
    if not transposed:
        taps = [_live(*sizes) for sizes in zip(x[2:], y[2:], w[2:], *wide[:3], strict=True)]
    cut, left = (tuple(part) for part in zip(*taps, strict=True))
    return Geometry(
        x[0],
        x[1],
        x[2:],
        w,
        y[2:],
        cut,
        wide[0],
        left,
        wide[2],
        bool(transposed),
        wide[3],
        int(groups),  # type: ignore
    )


def geometry(x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], arguments: tuple[object, ...]) -> Geometry:
    """The geometry of a call of ``aten.convolution`` with these shapes of input, weight and output."""
    return _geometry(tuple(x), tuple(w), tuple(y), *(tuple(a) if isinstance(a, list) else a for a in arguments[3:9]))


def _of(c: Call) -> Geometry:
    return geometry(c.shape(0), c.shape(1), c.out.shape, c.node.args)


def _fold(x: Tensor) -> Tensor:
    """(probes, batch, …) -> (probes·batch, …)."""
    return x.reshape(-1, *x.shape[2:])


def _beside(x: Tensor) -> Tensor:
    """(probes, n, c, …) -> (n, probes·c, …): probes side by side along the channels; channels last where they were."""
    if len(x) == 1:
        return x[0]
    last = x.movedim(2, -1)
    if last.is_contiguous():
        return last.movedim(0, -2).flatten(-2).movedim(-1, 1)
    return x.transpose(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _apart(x: Tensor, probes: int) -> Tensor:
    """(n, probes·c, …) -> (probes, n, c, …): the inverse of :func:`_beside`."""
    return x.unflatten(1, (probes, -1)).transpose(0, 1)


def _stacked(arena: Arena, rows: Sequence[Tensor]) -> Tensor:
    """Weights one behind the other, contiguous whatever their own layout: so vectors have them."""
    return torch.stack(list(rows), out=arena.empty(rows[0], len(rows), *rows[0].shape))


def _crop(geo: Geometry, w: Tensor) -> Tensor:
    """(…, *K) -> the taps that meet the input."""
    return w if w.shape[-len(geo.taps) :] == geo.kernel else w[geo.live]


def _uncrop(arena: Arena, geo: Geometry, w: Tensor) -> Tensor:
    if geo.kernel == geo.weight[2:]:
        return w
    full = arena.empty(w, *w.shape[: -len(geo.taps)], *geo.weight[2:]).zero_()
    full[geo.live] = w
    return full


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


def _forward(arena: Arena, geo: Geometry, x: Tensor, w: Tensor) -> Tensor:
    if geo.is_matrix(len(x)):
        return _grid(_patches(geo, x) @ w.reshape(w.shape[:2]).T, geo.out)
    y = aten.convolution(arena.laid_out(x, geo.inside(len(x))), w, None, *geo.arguments)
    return arena.laid_out(y, geo.outside)


def _input_adjoint(arena: Arena, geo: Geometry, g: Tensor, w: Tensor) -> Tensor:
    if geo.is_matrix(len(g)):
        return _spread(geo, _rows(g) @ w.reshape(w.shape[:2]))
    layout, channels = geo.inside(len(g)), w.shape[0] if geo.transposed else w.shape[1] * geo.groups
    g = arena.laid_out(g, layout)
    like = torch.empty(len(g), channels, *geo.side, dtype=g.dtype, device=g.device, memory_format=layout)  # a shape
    x = aten.convolution_backward(g, like, w, [0], *geo.arguments, [True, False, False])[0]
    return arena.laid_out(x, geo.outside)


def _weight_adjoint(arena: Arena, geo: Geometry, terms: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Of the sum of convolutions with cotangents g and inputs x, ``terms`` = [(g, x), …]."""
    if len(terms) > 1 and not geo.joins:
        return sum(
            (_weight_adjoint(arena, geo, [term]) for term in terms[1:]), start=_weight_adjoint(arena, geo, terms[:1])
        )
    layout = geo.inside(sum(len(g) for g, _ in terms))
    sides = [[arena.laid_out(t, layout) for t in side] for side in zip(*terms, strict=True)]
    g, x = (side[0] if len(side) == 1 else torch.cat(side) for side in sides)
    inner, outer = x.shape[1] // geo.groups, g.shape[1]
    shape = (inner * geo.groups, outer // geo.groups) if geo.transposed else (outer, inner)
    like = g.new_empty(*shape, *geo.kernel)  # only its shape is read
    return aten.convolution_backward(g, x, like, [0], *geo.arguments, [False, True, False])[1]


def _with_weight(
    run: Callable[[Arena, Geometry, Tensor, Tensor], Tensor], aside: Callable[[Tensor], Tensor]
) -> Product:
    """``run(geometry, activation, weight)`` for all probes; ``aside`` lays their weights along what ``run`` returns."""

    def product(c: Call, x: Tensor, w: Tensor, into: Tensor | None) -> Tensor:
        geo, probes = _of(c), max(len(x), len(w))
        w = _crop(geo, w)
        if len(w) == 1:
            y = run(c.arena, geo, _fold(x), w[0])
            return added(y.reshape(probes, -1, *y.shape[1:]), into)
        if geo.folds and len(x) == 1:
            return added(_apart(run(c.arena, geo, x[0], aside(w)), probes), into)
        return added(torch.stack([run(c.arena, geo, x[min(k, len(x) - 1)], w[k]) for k in range(probes)]), into)

    return product


def _right(c: Call, terms: Terms, into: Tensor | None) -> Tensor:
    geo, probes = _of(c), max(len(t) for term in terms for t in term)
    if probes > 1 and geo.folds and all(len(g) == 1 or len(x) == 1 for g, x in terms):
        for g, x in terms:
            into = _add(c.arena, geo, _folded(c.arena, geo, g, x), into)
        return into  # type: ignore[return-value]  # there is a term
    if geo.is_patches(geo.batch * (len(terms) if geo.joins else 1)):
        return _add(c.arena, geo, _of_patches(c.arena, geo, terms, probes), into)
    rows = [
        _weight_adjoint(c.arena, geo, [tuple(t[min(k, len(t) - 1)] for t in term) for term in terms])
        for k in range(probes)
    ]
    return _add(c.arena, geo, _stacked(c.arena, rows), into)


def _of_patches(arena: Arena, geo: Geometry, terms: Terms, probes: int) -> Tensor:
    """:func:`_weight_adjoint` of all probes as one batch of matrix products."""

    def side(tensors: Sequence[Tensor], lay: Callable[[Tensor], Tensor]) -> Tensor:
        laid = [lay(_fold(t)).unflatten(0, (len(t), -1)).expand(probes, -1, -1) for t in tensors]
        return laid[0] if len(laid) == 1 else torch.cat(laid, dim=1)

    g, x = (list(tensors) for tensors in zip(*terms, strict=True))
    left, right = side(g, _rows).mT, side(x, lambda t: _patches(geo, t))
    found = torch.bmm(left, right, out=arena.empty(left, probes, left.shape[1], right.shape[2]))
    return found.reshape(probes, *geo.weight[:2], *geo.kernel)


def _folded(arena: Arena, geo: Geometry, g: Tensor, x: Tensor) -> Tensor:
    """Weight adjoints of several probes as one: those of the cotangent, or of the input, side by side."""
    if len(x) == 1:
        return _weight_adjoint(arena, geo, [(_beside(g), x[0])]).unflatten(0, (len(g), -1))
    return _apart(_weight_adjoint(arena, geo, [(g[0], _beside(x))]), len(x))


def _add(arena: Arena, geo: Geometry, w: Tensor, into: Tensor | None) -> Tensor:
    if into is None:
        return _uncrop(arena, geo, w)
    _crop(geo, into).add_(w)
    return into


def _kept(c: Call, slot: int, value: Tensor) -> Tensor:
    """An operand as the products like it, (1, …): weights cut to their live taps, activations in their layout."""
    geo = _of(c)
    if slot == 1:
        return _crop(geo, value).contiguous()[None]
    return c.arena.laid_out(value, geo.inside(len(value)))[None]


def _run(node: Node, inputs: Sequence[Tensor], arena: Arena) -> Tensor:
    """As the model itself runs it, to the bit, so that every ReLU decides as it does there; laid out for the sweeps."""
    x, *rest = inputs
    if x.is_cuda:  # layouts are algorithms there, which round each in their own way
        return execute(node, inputs)
    y = execute(node, [arena.laid_out(x, torch.contiguous_format), *rest])
    return arena.laid_out(y, _CHANNELS_LAST.get(y.ndim - 2, torch.contiguous_format))


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
    _with_weight(_forward, _fold),
    _with_weight(_input_adjoint, _beside),
    _right,
    _kept,
    _run,
    lambda call: not _of(call).joins,
    samples=Samples.CONVOLUTION,
    flops=_flops,
    workspace=_workspace,
)

__all__ = ["Geometry", "convolution", "geometry"]
