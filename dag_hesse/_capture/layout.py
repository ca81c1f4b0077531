"""Arithmetic on batch layouts: where the sample number goes when an op moves data.

The sample of an element is a digit of its place along one axis: ``place // inner % batch``. Reshapes move that digit by
comparing strides; ops that pick along the axis are run on the *line* of that axis, the sample number of every place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from dag_hesse.ir import BatchLayout

FREE = -1  # in a line: the same for all samples


@dataclass(frozen=True, slots=True)
class Place:
    """``axis`` has size outer · batch · inner; the middle factor counts samples, from number ``start`` on."""

    axis: int
    outer: int
    batch: int
    inner: int
    start: int = 0

    @property
    def size(self) -> int:
        """Of the axis."""
        return self.outer * self.batch * self.inner

    def at(self, axis: int) -> Place:
        """The same along another axis."""
        return replace(self, axis=axis)

    def line(self) -> Tensor:
        """The sample number at every place of the axis."""
        return self.start + torch.arange(self.size, device="cpu") // self.inner % self.batch

    def layout(self, batch: int) -> BatchLayout | None:
        """As it stands in a graph, where it holds all samples of the batch."""
        whole = self.batch == batch and self.start == 0
        return BatchLayout(self.axis, self.outer, self.batch, self.inner) if whole else None


def reshaped(place: Place, old: Sequence[int], new: Sequence[int]) -> Place | None:
    """Where the samples lie after a reshape; None if they are cut across axes."""
    stride, after = place.inner * prod(old[place.axis + 1 :]), 1  # elements between neighbouring samples
    if place.batch == 1 and new and (axis := _single(new, stride)) is not None:
        return replace(place, axis=axis, outer=1, inner=new[axis])
    for axis in reversed(range(len(new))):
        if after <= stride < after * new[axis]:
            inner, rest = divmod(stride, after)
            whole = rest == 0 and new[axis] % (inner * place.batch) == 0
            return replace(place, axis=axis, outer=new[axis] // (inner * place.batch), inner=inner) if whole else None
        after *= new[axis]
    return None


def _single(new: Sequence[int], stride: int) -> int | None:
    """An axis of size 1 with that stride; the first axis, where a lone sample's stride is all there is."""
    same = [axis for axis, size in enumerate(new) if size == 1 and prod(new[axis + 1 :]) == stride]
    return same[0] if same else 0 if stride == prod(new) else None


def along(line: Tensor, axis: int) -> Place | None:
    """The place that a line of sample numbers describes; None if it is none (or free all along)."""
    numbers = line[line != FREE]
    if not len(numbers):
        return None
    first, last = int(numbers.min()), int(numbers.max())
    batch, size = last - first + 1, len(line)
    if size % batch:
        return None
    for inner in _divisors(size // batch):
        place = Place(axis, size // (batch * inner), batch, inner, first)
        if bool(((line == place.line()) | (line == FREE)).all()):
            return place
    return None


def _divisors(n: int) -> Iterable[int]:
    return (k for k in range(1, n + 1) if n % k == 0)


def spread(place: Place | None, shape: Sequence[int]) -> Tensor:
    """The sample number of every element of a tensor, as an expanded view that takes no memory."""
    if place is None:
        return torch.full((), FREE, device="cpu").expand(tuple(shape))
    return place.line().reshape([-1 if axis == place.axis else 1 for axis in range(len(shape))]).expand(tuple(shape))


def found(labels: Tensor) -> Place | None:
    """The axis along which sample numbers run, all other axes holding the same; None if there is no such axis."""
    if not labels.numel():
        return None
    top = labels.max()
    low = torch.where(labels == FREE, top, labels)  # what is free agrees with anything
    for axis in range(labels.ndim):
        rest = [k for k in range(labels.ndim) if k != axis]
        high, least = (labels.amax(rest), low.amin(rest)) if rest else (labels, low)
        if bool(((high == least) | (high == FREE)).all()) and (place := along(high, axis)) is not None:
            return place
    return None
