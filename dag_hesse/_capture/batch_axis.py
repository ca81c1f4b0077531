"""Arithmetic on batch axes: where the sample number goes when an op moves data.

The sample of an element is a digit of its place along one axis: ``place // inner % batch``. Reshapes move that digit by
comparing strides; ops that pick along the axis are run on the *line* of that axis, the sample number of every place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from dag_hesse.ir import BatchAxis

FREE = -1  # in a line: the same for all samples


def reshaped(batch_axis: BatchAxis, old: Sequence[int], new: Sequence[int]) -> BatchAxis | None:
    """Where the samples lie after a reshape; None if they are cut across axes."""
    stride, after = batch_axis.inner * prod(old[batch_axis.axis + 1 :]), 1  # elements between neighbouring samples
    if batch_axis.batch == 1 and new and (axis := _single(new, stride)) is not None:
        return replace(batch_axis, axis=axis, outer=1, inner=new[axis])
    for axis in reversed(range(len(new))):
        if after <= stride < after * new[axis]:
            inner, rest = divmod(stride, after)
            outer, left = divmod(new[axis], inner * batch_axis.batch)
            return replace(batch_axis, axis=axis, outer=outer, inner=inner) if rest == 0 and left == 0 else None
        after *= new[axis]
    return None


def _single(new: Sequence[int], stride: int) -> int | None:
    """An axis of size 1 with that stride; the first axis, where a lone sample's stride is all there is."""
    same = [axis for axis, size in enumerate(new) if size == 1 and prod(new[axis + 1 :]) == stride]
    return same[0] if same else 0 if stride == prod(new) else None


def along(line: Tensor, axis: int) -> BatchAxis | None:
    """The batch axis that a line of sample numbers describes; None if it is none (or free all along)."""
    numbers = line[line != FREE]
    if not len(numbers):
        return None
    first, last = int(numbers.min()), int(numbers.max())
    batch, size = last - first + 1, len(line)
    if size % batch:
        return None
    for inner in _divisors(size // batch):
        batch_axis = BatchAxis(axis, size // (batch * inner), batch, inner, first)
        if bool(((line == batch_axis.line()) | (line == FREE)).all()):
            return batch_axis
    return None


def _divisors(n: int) -> Iterable[int]:
    return (k for k in range(1, n + 1) if n % k == 0)


def spread(batch_axis: BatchAxis | None, shape: Sequence[int]) -> Tensor:
    """The sample number of every element of a tensor, as an expanded view that takes no memory."""
    if batch_axis is None:
        return torch.full((), FREE, device="cpu").expand(tuple(shape))
    lined = [-1 if axis == batch_axis.axis else 1 for axis in range(len(shape))]
    return batch_axis.line().reshape(lined).expand(tuple(shape))


def found(labels: Tensor) -> BatchAxis | None:
    """The axis along which sample numbers run, all other axes holding the same; None if there is no such axis."""
    if not labels.numel():
        return None
    top = labels.max()
    low = torch.where(labels == FREE, top, labels)  # what is free agrees with anything
    for axis in range(labels.ndim):
        rest = [k for k in range(labels.ndim) if k != axis]
        high, least = (labels.amax(rest), low.amin(rest)) if rest else (labels, low)
        if bool(((high == least) | (high == FREE)).all()) and (batch_axis := along(high, axis)) is not None:
            return batch_axis
    return None
