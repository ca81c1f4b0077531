"""Memory that products write to, handed from problem to engine to kernels.

A system hands out large allocations as new pages, and those cost more than what is written to them. The products of an
operator therefore take them from a pool of its own, to which they come back by themselves.
"""

from __future__ import annotations

import weakref
from bisect import bisect
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

_LARGE = 1 << 22  # bytes; smaller allocations are reused by the system's allocator as they are
_ALIGNED = 64  # bytes
_STAGGER = 17 * _ALIGNED  # between allocations: operands that lie a power of two apart evict each other from the caches
_FIRST = 1 << 26  # bytes of the first slab; the next ones are as large as all before


class Arena:
    """Where results are written. This one takes new memory for each; a :class:`Pool` uses what others gave back."""

    def serves(self, like: Tensor, count: int) -> bool:
        """Whether memory for ``count`` elements comes from here; else PyTorch finds it."""
        return False

    def take(self, like: Tensor, count: int) -> Tensor:
        """Memory for ``count`` elements, flat."""
        return like.new_empty(count)

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialized tensor of the dtype and device of ``like``."""
        count = prod(shape)
        return self.take(like, count).view(shape) if self.serves(like, count) else like.new_empty(shape)

    def room(self, x: Tensor, *others: object) -> Tensor | None:
        """Where an elementwise function of ``x`` and ``others``, laid out as x is, can be written.

        None where PyTorch is to find the place: the result is small, or of another shape.
        """
        count = x.numel()
        if not self.serves(x, count) or not is_dense(x):
            return None
        shapes = [t.shape for t in others if isinstance(t, Tensor)]
        if torch.broadcast_shapes(x.shape, *shapes) != x.shape:
            return None
        return self.take(x, count).as_strided(x.shape, x.stride())

    def blank(self, like: Tensor) -> Tensor:
        """An uninitialized tensor laid out as ``like``, which is dense."""
        place = self.room(like)
        return torch.empty_like(like) if place is None else place

    def empty_as(self, probes: Tensor, value: Tensor) -> Tensor:
        """Uninitialized, (probes, *value), each laid out as ``value`` (in order of the axes, where that has gaps)."""
        return self.in_order(probes, (len(probes), *value.shape), value)

    def in_order(self, like: Tensor, shape: Sequence[int], value: Tensor) -> Tensor:
        """Uninitialized, with the last axes in the order that ``value`` has them in (their own, where it has gaps)."""
        if not is_dense(value):
            return self.empty(like, *shape)
        strides, lead = value.stride(), len(shape) - value.ndim
        order = sorted(range(value.ndim), key=lambda axis: -strides[axis])
        places = [order.index(axis) + lead for axis in range(value.ndim)]
        lying = self.empty(like, *shape[:lead], *(shape[lead + axis] for axis in order))
        return lying.permute(*range(lead), *places)


SYSTEM = Arena()


class Pool(Arena):
    """CPU memory in slabs, given out in allocations. One is free again when the last tensor in it is gone.

    What is asked for lies as low as it can, so that pages above the most that was ever in use are never touched.

    Examples:
        >>> pool, like = Pool(), torch.zeros(1)
        >>> place = pool.empty(like, 1024, 1024).data_ptr()
        >>> pool.empty(like, 2048, 1024).data_ptr() == place
        True
    """

    def __init__(self) -> None:
        self._slabs: list[_Slab] = []
        self._returned: list[tuple[_Slab, int, int]] = []  # tensors end at any time, even while gaps are looked through

    @property
    def size(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.size for slab in self._slabs)

    def serves(self, like: Tensor, count: int) -> bool:
        return count * like.itemsize >= _LARGE and like.device.type == "cpu"

    def take(self, like: Tensor, count: int) -> Tensor:
        return self.lent(count * like.itemsize).view(like.dtype)

    def lent(self, size: int) -> Tensor:
        """``size`` uninitialized bytes."""
        self._collect()
        taken = size + -size % _ALIGNED + _STAGGER
        for slab in self._slabs:
            start = slab.allocate(taken)
            if start is not None:
                break
        else:
            slab = _Slab(max(taken, _FIRST, self.size))
            self._slabs.append(slab)
            start = slab.allocate(taken) or 0
        piece = slab.memory[start : start + size]
        weakref.finalize(piece, self._returned.append, (slab, start, start + taken)).atexit = False
        return torch.from_numpy(piece)

    def retire(self) -> None:
        """Start anew, as if nothing had been lent yet: what comes back of old slabs is not lent again."""
        self._slabs.clear()

    def _collect(self) -> None:
        while self._returned:
            slab, start, stop = self._returned.pop()
            slab.join(start, stop)


class _Slab:
    """One piece of memory, and what of it is free: gaps (start, stop), ascending, none beside another."""

    def __init__(self, size: int) -> None:
        whole = np.empty(size + _ALIGNED, np.uint8)  # on huge pages, where the system has them
        first = -whole.ctypes.data % _ALIGNED
        self.memory, self.size, self.gaps = whole[first : first + size], size, [(0, size)]

    def allocate(self, size: int) -> int | None:
        """Start of ``size`` bytes in the lowest gap that has them; None if there is none."""
        for k, (start, stop) in enumerate(self.gaps):
            if stop - start >= size:
                self.gaps[k : k + 1] = [(start + size, stop)] if stop - start > size else []
                return start
        return None

    def join(self, start: int, stop: int) -> None:
        """Free an allocation, as one gap with its neighbours."""
        k = bisect(self.gaps, (start, stop))
        if k < len(self.gaps) and self.gaps[k][0] == stop:
            stop = self.gaps.pop(k)[1]
        if k and self.gaps[k - 1][1] == start:
            k -= 1
            start = self.gaps.pop(k)[0]
        self.gaps.insert(k, (start, stop))


def is_dense(x: Tensor) -> bool:
    """Whether every place of the memory that ``x`` spans is one of its elements, once."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, count in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= count
    return True


def is_traced(x: Tensor) -> bool:
    """Whether ``x`` stands for a tensor of a program that is being traced."""
    return torch._is_functional_tensor(x)


def has_values(x: Tensor) -> bool:
    """Whether the values of ``x`` may be looked at: it is not on ``meta``, and no program is being traced."""
    return not (x.is_meta or is_traced(x))


def is_owned(x: Tensor, *others: Tensor) -> bool:
    """Whether ``x`` can be written to: it has memory of its own, apart from these tensors, once for every element.

    A product is linear in what it is given, so it is new, or a view of that. While a program is traced, nothing is:
    what is written to is for its compiler to choose.
    """
    if is_traced(x):
        return False
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        return False
    place = x.untyped_storage().data_ptr()
    return all(place != other.untyped_storage().data_ptr() for other in others)


def added(x: Tensor, into: Tensor | None) -> Tensor:
    """``x``, or ``into`` with ``x`` added to it."""
    return x if into is None else into.add_(x)


def plus_term(x: Tensor, abar: Tensor, rows: slice, second: Callable[[Tensor | None], Tensor | None]) -> Tensor:
    """``x``, which came of ``abar``, with a term added to its ``rows``; ``second(into)`` makes or adds it."""
    if is_owned(x, abar):
        second(x[rows])
        return x
    term = second(None)
    if term is not None:
        x = x.clone(memory_format=torch.contiguous_format)
        x[rows] += term
    return x


__all__ = ["SYSTEM", "Arena", "Pool", "added", "has_values", "is_dense", "is_owned", "is_traced", "plus_term"]
