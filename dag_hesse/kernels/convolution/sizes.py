"""A convolution's sizes, and which products suit them.

Kernel taps that only ever read padding are left out. What remains of a large weight is often 1×1: that is a matrix
product, which reads the weight once and never reorders it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class Geometry:
    """A convolution's sizes: input (batch, C, *S), weight (O, C/groups, *K), output (batch, O, *S').

    ``kernel_taps`` is, per spatial axis, the part of the kernel that meets the input; ``padding`` is what is left of
    the padding once the others are gone. ``last`` says whether activations lie channels last.
    """

    batch: int
    channels: int
    side: tuple[int, ...]
    weight: tuple[int, ...]
    out: tuple[int, ...]
    kernel_taps: tuple[slice, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    last: bool

    @cached_property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the part of the kernel that meets the input."""
        return tuple(tap.stop - tap.start for tap in self.kernel_taps)

    @cached_property
    def reached_taps(self) -> Any:
        """Index of that part in (…, *K)."""
        return (..., *self.kernel_taps)

    @cached_property
    def plain(self) -> bool:
        """Whether the weight is one block, outputs by inputs."""
        return self.groups == 1 and not self.transposed

    @cached_property
    def folds(self) -> bool:
        """Whether weights of several probes are better laid side by side than taken one by one: small ones are."""
        return self.plain and self.batch * prod(self.out) > self.weight[0]

    @cached_property
    def joins(self) -> bool:
        """Whether a sum of two weight adjoints is better one of twice the batch: small activations are."""
        read = self.batch * (self.channels * prod(self.side) + self.weight[0] * prod(self.out))
        return read <= 8 * prod(self.weight[:2]) * prod(self.kernel)

    @cached_property
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

    @cached_property
    def outside(self) -> torch.memory_format:
        """Memory format that all activations have in common."""
        return CHANNELS_LAST.get(len(self.side), torch.contiguous_format) if self.last else torch.contiguous_format

    def inside(self, batch: int) -> torch.memory_format:
        """Memory format that the vendor's kernels like: channels last where the weight is not the larger operand."""
        wide = batch * prod(self.out) >= 4 * self.weight[0]
        return self.outside if wide else torch.contiguous_format

    @cached_property
    def strided(self) -> Any:
        """Index of the positions that a weight of one kernel tap reads, in (…, *S)."""
        return (..., *(slice(None, None, s) for s in self.stride))

    @cached_property
    def arguments(self) -> tuple[object, ...]:
        """What ``aten.convolution`` takes after the bias."""
        lists = [list(v) for v in (self.stride, self.padding, self.dilation, self.output_padding)]
        return lists[0], lists[1], lists[2], self.transposed, lists[3], self.groups


def _live(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[slice, int]:
    """The kernel taps that some output reads the input through, and the padding in front of the first of them."""
    reads = [any(0 <= o * stride - padding + t * dilation < size for o in range(out)) for t in range(kernel)]
    if not any(reads):  # padding alone
        return slice(0, kernel), padding
    first, last = reads.index(True), kernel - reads[::-1].index(True)
    rest = padding - first * dilation
    same = rest >= 0 and (size + 2 * rest - dilation * (last - first - 1) - 1) // stride + 1 == out
    return (slice(first, last), rest) if same else (slice(0, kernel), padding)


@cache
def _geometry(x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], *rest: object) -> Geometry:
    stride, padding, dilation, transposed, output_padding, groups, last = rest
    dims = len(w) - 2
    wide = [tuple(v) * (dims // len(v)) for v in (stride, padding, dilation, output_padding)]  # type: ignore[arg-type]
    taps = [(slice(0, k), p) for k, p in zip(w[2:], wide[1], strict=True)]
    if not transposed:
        taps = [_live(*sizes) for sizes in zip(x[2:], y[2:], w[2:], *wide[:3], strict=True)]
    met, left = (tuple(part) for part in zip(*taps, strict=True))
    return Geometry(
        x[0],
        x[1],
        x[2:],
        w,
        y[2:],
        met,
        wide[0],
        left,
        wide[2],
        bool(transposed),
        wide[3],
        int(groups),  # type: ignore
        bool(last),
    )


def geometry(
    x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], arguments: tuple[object, ...], last: bool = True
) -> Geometry:
    """The geometry of a call of ``aten.convolution`` with these shapes of input, weight and output."""
    rest = [tuple(a) if isinstance(a, list) else a for a in arguments[3:9]]
    return _geometry(tuple(x), tuple(w), tuple(y), *rest, last)


def crop(geo: Geometry, w: Tensor) -> Tensor:
    """(…, *K) -> the kernel taps that meet the input."""
    return w if w.shape[-len(geo.kernel_taps) :] == geo.kernel else w[geo.reached_taps]


__all__ = ["CHANNELS_LAST", "Geometry", "crop", "geometry"]
