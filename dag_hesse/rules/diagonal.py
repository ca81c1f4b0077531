"""Rules of elementwise ops (with broadcasting), given by their first and second partials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from dag_hesse.ir.node import Kind, Node, Ref
from dag_hesse.kernels.pointwise import Coefficient, adjoint, curvature, tangent, times
from dag_hesse.rules.base import Call, Linearized, Note, Pairs, Partials, Rule, Tangents, no_pairs, own_pair

Align = Callable[[Call, int], tuple[int, ...]]


@final
class _Diagonal(Linearized):
    def __init__(self, call: Call, partials: Partials, align: Align | None) -> None:
        first, self.raw = partials(call)
        self.first = [first.get(slot) for slot in range(len(call.values))]
        self.shapes = [value.shape for value in call.values]
        self.out_shape = call.out.shape
        self.aligned = self.shapes
        if align is not None:
            self.aligned = [v.reshape(align(call, slot)).shape for slot, v in enumerate(call.values)]
        self.seconds: dict[tuple[int, int], Coefficient] = {}

    def _align(self, tangents: Tangents) -> Tangents:
        if self.aligned is self.shapes:
            return tangents
        return {slot: x.reshape(len(x), *self.aligned[slot]) for slot, x in tangents.items()}

    def jvp(self, tangents: Tangents) -> Tensor:
        return tangent(self.first, self._align(tangents), self.out_shape)

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        partial = self.first[slot]
        assert partial is not None
        data = adjoint(partial, cotangent, self.aligned[slot])
        return data.reshape(len(data), *self.shapes[slot])

    def curve(self, lam: Tensor, pulled: Tangents) -> None:
        self.seconds = {pair: times(h, lam) for pair, h in self.raw.items()}
        self.raw = {}

    def second(self, tangents: Tangents, note: Note, slot: int, into: Tensor | None = None) -> Tensor | None:
        aligned = into if into is None else into.view(len(into), *self.aligned[slot])
        data = curvature(self.seconds, self._align(tangents), slot, self.aligned[slot], self.out_shape, aligned)
        if data is None or into is not None:
            return data if data is None else into
        return data.reshape(len(data), *self.shapes[slot])


def diagonal(kind: Kind, partials: Partials, pairs: Callable[[Node], Pairs], align: Align | None = None) -> Rule:
    """An elementwise op (with broadcasting) given by its first and second partials.

    ``align(call, slot)`` is the shape in which an input broadcasts, where that is not its own.
    """
    return Rule(kind, lambda call: _Diagonal(call, partials, align), pairs, partials, align)


Derivative = Callable[[Call], Coefficient]


def pointwise(d1: Derivative, d2: Derivative) -> Rule:
    """A smooth unary op with derivatives d1 and d2 as functions of the call (``values[0]`` is x, ``out`` is y)."""
    return diagonal(Kind.POINTWISE, lambda c: ({0: d1(c)}, {(0, 0): d2(c)}), own_pair)


def pointwise_jointly(derivatives: Callable[[Call], tuple[Tensor, Tensor]]) -> Rule:
    """A smooth unary op whose derivatives share what is dear: ``derivatives(call)`` is (d1, d2)."""

    def partials(call: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
        first, second = derivatives(call)
        return {0: first}, {(0, 0): second}

    return diagonal(Kind.POINTWISE, partials, own_pair)


def piecewise_linear(d1: Derivative) -> Rule:
    """A unary op with second derivative 0 almost everywhere."""
    return diagonal(Kind.PIECEWISE_LINEAR, lambda c: ({0: d1(c)}, {}), no_pairs)


def _like(value: Any, y: Tensor) -> Any:
    return value.to(y.dtype) if isinstance(value, Tensor) else value


Operand = Callable[[Any, Any, Tensor], Coefficient]


def binary(
    da: Operand,
    db: Operand,
    daa: Operand | None = None,
    dab: Operand | None = None,
    dbb: Operand | None = None,
    kind: Kind = Kind.POINTWISE,
) -> Rule:
    """An elementwise op of two operands (tensors or numbers); each partial is a function of (a, b, y)."""
    firsts = (da, db)
    second_table = {(0, 0): daa, (0, 1): dab, (1, 0): dab, (1, 1): dbb}

    def partials(call: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
        y = call.out
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

    return diagonal(kind, partials, pairs)


__all__ = ["binary", "diagonal", "piecewise_linear", "pointwise", "pointwise_jointly"]
