"""Convolution, and how each of its products is computed: the shapes decide.

Kernel taps that only ever read padding are left out. What remains of a large weight is often 1×1: that is a matrix
product, which reads the weight once and never reorders it. Where activations are large they are laid out channels last,
which the vendor's kernels like best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from dag_hesse.rules.base import Call, Product, added, bilinear

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
    def live(self) -> tuple[Any, ...]:
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

    def is_matrix(self, batch: int) -> bool:
        """Whether a product with ``batch`` samples (probes counted) is a matrix product with a larger weight."""
        unit = all(k == s == 1 and p == 0 for k, s, p in zip(self.kernel, self.stride, self.padding, strict=True))
        return unit and self.plain and batch * prod(self.out) <= self.weight[0]

    def layout(self, batch: int) -> torch.memory_format:
        """Memory format of activations: channels last where they are much larger than the weight."""
        wide = batch * prod(self.out) >= 4 * self.weight[0]
        return _CHANNELS_LAST.get(len(self.side), torch.contiguous_format) if wide else torch.contiguous_format

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
    """(probes, n, c, …) -> (n, probes·c, …): probes side by side along the channels."""
    return x[0] if len(x) == 1 else x.transpose(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _apart(x: Tensor, probes: int) -> Tensor:
    """(n, probes·c, …) -> (probes, n, c, …): the inverse of :func:`_beside`."""
    return x.unflatten(1, (probes, -1)).transpose(0, 1)


def _crop(geo: Geometry, w: Tensor) -> Tensor:
    """(…, *K) -> the taps that meet the input."""
    return w if w.shape[-len(geo.taps) :] == geo.kernel else w[geo.live]


def _uncrop(geo: Geometry, w: Tensor) -> Tensor:
    if geo.kernel == geo.weight[2:]:
        return w
    full = w.new_zeros(*w.shape[: -len(geo.taps)], *geo.weight[2:])
    full[geo.live] = w
    return full


def _rows(x: Tensor) -> Tensor:
    """(batch, c, *S) -> (batch·S, c)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _grid(rows: Tensor, side: tuple[int, ...]) -> Tensor:
    """(batch·S, c) -> (batch, c, *S): the inverse of :func:`_rows`."""
    return rows.reshape(-1, *side, rows.shape[1]).movedim(-1, 1)


def _forward(geo: Geometry, x: Tensor, w: Tensor) -> Tensor:
    if geo.is_matrix(len(x)):
        return _grid(_rows(x) @ w.reshape(w.shape[:2]).T, geo.out)
    return aten.convolution(x.contiguous(memory_format=geo.layout(len(x))), w, None, *geo.arguments)


def _input_adjoint(geo: Geometry, g: Tensor, w: Tensor) -> Tensor:
    if geo.is_matrix(len(g)):
        return _grid(_rows(g) @ w.reshape(w.shape[:2]), geo.side)
    layout, channels = geo.layout(len(g)), w.shape[0] if geo.transposed else w.shape[1] * geo.groups
    g = g.contiguous(memory_format=layout)
    like = torch.empty(len(g), channels, *geo.side, dtype=g.dtype, device=g.device, memory_format=layout)  # a shape
    return aten.convolution_backward(g, like, w, [0], *geo.arguments, [True, False, False])[0]


def _weight_adjoint(geo: Geometry, g: Tensor, x: Tensor) -> Tensor:
    inner, outer = x.shape[1] // geo.groups, g.shape[1]
    shape = (x.shape[1], outer // geo.groups) if geo.transposed else (outer, inner)
    if geo.is_matrix(len(g)):
        return (_rows(g).T @ _rows(x)).reshape(*shape, *geo.kernel)
    layout, like = geo.layout(len(g)), g.new_empty(*shape, *geo.kernel)  # only its shape is read
    g, x = g.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    return aten.convolution_backward(g, x, like, [0], *geo.arguments, [False, True, False])[1]


Run = Callable[[Geometry, Tensor, Tensor], Tensor]


def _with_weight(run: Run, aside: Callable[[Tensor], Tensor]) -> Product:
    """``run(geometry, activation, weight)`` for all probes; ``aside`` lays their weights along what ``run`` returns."""

    def product(c: Call, x: Tensor, w: Tensor, into: Tensor | None) -> Tensor:
        geo, probes = _of(c), max(len(x), len(w))
        w = _crop(geo, w)
        if len(w) == 1:
            y = run(geo, _fold(x), w[0])
            return added(y.reshape(probes, -1, *y.shape[1:]), into)
        if geo.folds and len(x) == 1:
            return added(_apart(run(geo, x[0], aside(w)), probes), into)
        return added(torch.stack([run(geo, x[min(k, len(x) - 1)], w[k]) for k in range(probes)]), into)

    return product


def _right(c: Call, g: Tensor, x: Tensor, into: Tensor | None) -> Tensor:
    geo, probes = _of(c), max(len(g), len(x))
    if probes == 1:
        w = _weight_adjoint(geo, g[0], x[0])[None]
    elif geo.folds and len(x) == 1:
        w = _weight_adjoint(geo, _beside(g), x[0])
        w = w.reshape(probes, -1, *w.shape[1:])
    elif geo.folds and len(g) == 1:
        w = _apart(_weight_adjoint(geo, g[0], _beside(x)), probes)
    else:
        out = g.new_zeros(probes, *geo.weight) if into is None else into
        for k, row in enumerate(_crop(geo, out)):
            row += _weight_adjoint(geo, g[min(k, len(g) - 1)], x[min(k, len(x) - 1)])
        return out
    if into is None:
        return _uncrop(geo, w)
    _crop(geo, into).add_(w)
    return into


def _kept(c: Call, slot: int, value: Tensor) -> Tensor:
    """An operand as the products like it, (1, …): weights cut to their live taps, activations in their layout."""
    geo = _of(c)
    if slot == 1:
        return _crop(geo, value).contiguous()[None]
    return value.contiguous(memory_format=geo.layout(len(value)))[None]


convolution = bilinear(_with_weight(_forward, _fold), _with_weight(_input_adjoint, _beside), _right, _kept)

__all__ = ["Geometry", "convolution", "geometry"]
