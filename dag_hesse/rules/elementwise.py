"""Rules of elementwise ops (with broadcasting), given by their first and second partials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from torch import Tensor

from dag_hesse.ir.node import Kind, Node, Ref
from dag_hesse.kernels.elementwise import Adjoint, Coefficient, Coefficients, Seconds, adjoints, tangent, times
from dag_hesse.rules.base import (
    Buffers,
    Call,
    Linearized,
    Pairs,
    Partials,
    Residual,
    Rule,
    Samples,
    Tangents,
    no_pairs,
    own_pair,
)

Align = Callable[[Call, int], tuple[int, ...]]


def tangents_met(seconds: Seconds, tangents: Tangents, curved: Sequence[int]) -> Residual:
    """The tangents that second partials of the slots in ``curved`` meet; None where there are none."""
    return {j: x for j, x in tangents.items() if any((i, j) in seconds for i in curved)} or None


@final
class _Elementwise(Linearized):
    def __init__(self, call: Call, partials: Partials, align: Align | None) -> None:
        first, self.raw = partials(call)
        self.curved, self.arena = call.curved, call.arena
        self.of = Coefficients([first.get(slot) for slot in range(len(call.values))], {}, call.value.shape)
        self.shapes = [value.shape for value in call.values]
        self.aligned = self.shapes
        if align is not None:
            self.aligned = [v.reshape(align(call, slot)).shape for slot, v in enumerate(call.values)]

    def _align(self, tangents: Tangents) -> Tangents:
        if self.aligned is self.shapes:
            return tangents
        return {slot: x.reshape(len(x), *self.aligned[slot]) for slot, x in tangents.items()}

    def bind(self, lam: Tensor | None, slots: Sequence[int], into: Buffers) -> dict[int, Tensor]:
        if lam is not None and self.curved:
            self.of = self.of._replace(seconds={p: times(self.arena, h, lam[0]) for p, h in self.raw.items()})
        self.raw = {}
        return super().bind(lam, slots, into)

    def push(self, tangents: Tangents, onward: bool, curved: Sequence[int]) -> tuple[Tensor | None, Residual]:
        tangents = self._align(tangents)
        moved = tangent(self.arena, self.of, tangents) if onward else None
        return moved, tangents_met(self.of.seconds, tangents, curved)

    def pull(
        self, abar: Tensor | None, residual: Residual, rows: slice, slots: Sequence[int], into: Buffers
    ) -> dict[int, Tensor]:
        wanted = {slot: self.aligned[slot] for slot in slots}
        found = adjoints(self.arena, self.of, Adjoint(abar, residual or {}, rows, wanted))
        return {slot: x.reshape(len(x), *self.shapes[slot]) for slot, x in found.items()}


def elementwise(
    kind: Kind,
    partials: Partials,
    pairs: Callable[[Node], Pairs],
    align: Align | None = None,
    *,
    samples: Samples = Samples.ELEMENTWISE,
    linear: bool = False,
) -> Rule:
    """An elementwise op (with broadcasting) given by its first and second partials.

    ``align(call, slot)`` is the shape in which an input broadcasts, where that is not its own.
    """
    return Rule(kind, lambda call: _Elementwise(call, partials, align), pairs, samples, partials, align, linear=linear)


Derivative = Callable[[Call], Coefficient]


def smooth(d1: Derivative, d2: Derivative) -> Rule:
    """A smooth unary op with derivatives d1 and d2 as functions of the call (``values[0]`` is x, ``value`` is y)."""
    return elementwise(Kind.SMOOTH, lambda c: ({0: d1(c)}, {(0, 0): d2(c)}), own_pair)


def smooth_jointly(derivatives: Callable[[Call], tuple[Tensor, Tensor]]) -> Rule:
    """A smooth unary op whose derivatives share what is costly: ``derivatives(call)`` is (d1, d2)."""

    def partials(call: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
        first, second = derivatives(call)
        return {0: first}, {(0, 0): second}

    return elementwise(Kind.SMOOTH, partials, own_pair)


def piecewise_linear(d1: Derivative, *, linear: bool = False) -> Rule:
    """A unary op with second derivative 0 almost everywhere."""
    return elementwise(Kind.PIECEWISE_LINEAR, lambda c: ({0: d1(c)}, {}), no_pairs, linear=linear)


def _like(value: Any, y: Tensor) -> Any:
    return value.to(y.dtype) if isinstance(value, Tensor) else value


Operand = Callable[[Any, Any, Tensor], Coefficient]


def binary(
    da: Operand,
    db: Operand,
    daa: Operand | None = None,
    dab: Operand | None = None,
    dbb: Operand | None = None,
    kind: Kind = Kind.SMOOTH,
) -> Rule:
    """An elementwise op of two operands (tensors or numbers); each partial is a function of (a, b, y)."""
    firsts = (da, db)
    second_table = {(0, 0): daa, (0, 1): dab, (1, 0): dab, (1, 1): dbb}

    def partials(call: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
        y = call.value
        a, b = (_like(v, y) for v in (call.argument(0), call.argument(1, "other")))  # a count divides in y's precision
        slots = {
            position: slot for position in (0, 1) if (slot := call.slot(position)) is not None and call.active[slot]
        }
        first = {slot: firsts[position](a, b, y) for position, slot in slots.items()}
        second = {
            (i, j): d(a, b, y)
            for (p, q), d in second_table.items()
            if d is not None and (i := slots.get(p)) is not None and (j := slots.get(q)) is not None
        }
        return first, second

    def pairs(node: Node) -> Pairs:
        slots = {p: arg.slot for p, arg in enumerate(node.args[:2]) if isinstance(arg, Ref)}
        return frozenset((slots[p], slots[q]) for (p, q), d in second_table.items() if d and p in slots and q in slots)

    return elementwise(kind, partials, pairs)


__all__ = ["binary", "elementwise", "piecewise_linear", "smooth", "smooth_jointly", "tangents_met"]
