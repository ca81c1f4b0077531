"""What elementwise nodes are linearized into, and what goes back through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena


@dataclass(frozen=True, slots=True)
class Gate:
    """The coefficient 1[value > 0], given by a value that others keep anyway: it has no memory of its own."""

    value: Tensor

    def dense(self) -> Tensor:
        """As a tensor."""
        return (self.value > 0).to(self.value.dtype)


# A tensor that broadcasts to the node's shape, a number, or a gate.
Coefficient = Tensor | float | Gate
Seconds = Mapping[tuple[int, int], Coefficient]


class Coefficients(NamedTuple):
    """Of a node of shape ``shape``: c_i by slot, None for inputs that it is not differentiated by, and h_ij by pair."""

    first: Sequence[Coefficient | None]
    seconds: Seconds
    shape: Sequence[int]


class Adjoint(NamedTuple):
    """What goes back: ā, (rows, *shape), and in its ``rows`` second-order terms of ``tangents``, by slot.

    Without ā, those terms alone. ``wanted``: shapes of the inputs, by slot, that a result is for.
    """

    abar: Tensor | None
    tangents: Mapping[int, Tensor]
    rows: slice
    wanted: Mapping[int, Sequence[int]]


def lift(x: Tensor, ndim: int) -> Tensor:
    """Insert axes after the probe axis so that ``x`` (probes, *s) broadcasts against ``ndim`` trailing axes."""
    missing = ndim - (x.ndim - 1)
    return x if missing == 0 else x.reshape(x.shape[0], *(1,) * missing, *x.shape[1:])


def reduce_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum ``x`` (probes, *out) over the axes along which ``shape`` was broadcast to ``out``."""
    if x.shape[1:] == torch.Size(shape):
        return x
    extra = x.ndim - 1 - len(shape)
    axes = list(range(1, extra + 1))
    axes += [1 + extra + k for k, size in enumerate(shape) if size == 1 and x.shape[1 + extra + k] != 1]
    if axes:
        x = x.sum(axes)
    return x.reshape(x.shape[0], *shape)


def times(arena: Arena, c: Coefficient, x: Tensor) -> Tensor:
    """Return ``c ∘ x``, without a copy where c is the number 1."""
    if isinstance(c, Gate):
        place = arena.room(x, c.value)
        if place is None:
            return torch.ops.aten.threshold_backward(x, c.value, 0)
        return torch.ops.aten.threshold_backward.grad_input(x, c.value, 0, grad_input=place)
    return x if isinstance(c, float) and c == 1 else torch.mul(x, c, out=arena.room(x, c))


def plus_times(arena: Arena, total: Tensor, c: Coefficient, x: Tensor) -> Tensor:
    """Return ``total + c ∘ x``, in one pass where there is such a kernel."""
    if isinstance(c, Gate):
        return total + times(arena, c, x)
    place = arena.room(total, c, x)
    if isinstance(c, Tensor):
        return torch.addcmul(total, c, x, out=place)
    return torch.add(total, x, alpha=c, out=place)


def _plain(c: Coefficient) -> Tensor | float:
    return c.dense() if isinstance(c, Gate) else c


def product(arena: Arena, a: Coefficient, b: Coefficient) -> Coefficient:
    """Return the coefficient ``a ∘ b``."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, float) and one == 1:
            return other
        if isinstance(one, Tensor):
            return times(arena, other, one)
    return _plain(a) * _plain(b)


def plus_product(arena: Arena, total: Coefficient, a: Coefficient, b: Coefficient) -> Coefficient:
    """Return the coefficient ``total + a ∘ b``, in one pass where all are tensors."""
    total, a, b = _plain(total), _plain(a), _plain(b)
    if isinstance(total, Tensor) and isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.addcmul(total, a, b)
    return total + _plain(product(arena, a, b))


def add_times(arena: Arena, into: Tensor, c: Coefficient, x: Tensor) -> Tensor:
    """into += c ∘ x."""
    if isinstance(c, Gate):
        return into.add_(times(arena, c, x))
    return into.addcmul_(c, x) if isinstance(c, Tensor) else into.add_(x, alpha=c)


__all__ = [
    "Adjoint",
    "Coefficient",
    "Coefficients",
    "Gate",
    "Seconds",
    "add_times",
    "lift",
    "plus_product",
    "plus_times",
    "product",
    "reduce_to",
    "times",
]
