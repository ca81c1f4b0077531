"""Programs: instructions on registers, in static single assignment until registers are given out.

Most work element by element; those of ``ROWS`` on rows, which are what the last axes hold together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from dag_hesse import native

ROWS = ("row_sum", "row_mean")  # their number is how many axes a row has; every element of it becomes the same


@dataclass(frozen=True, slots=True)
class Value:
    """What an instruction of a program under construction makes, or an operand."""

    place: int


Scalar: TypeAlias = Value | float  # an element of a tensor, or a number that all elements share


@dataclass(frozen=True)
class Program:
    """``(name, slots, number)`` a row; slots are those of the result and the arguments.

    Slots are numbered: operands, then results, then registers. ``per_row``: of which results one element a row of the
    tensors is kept.
    """

    rows: tuple[tuple[str, tuple[int, ...], float], ...]
    operands: int
    per_row: tuple[bool, ...]
    registers: int

    @cached_property
    def compiled(self) -> Any:
        """The program as the extension runs it."""
        rows = [(name, list(slots), number) for name, slots, number in self.rows]
        return native.core.Program(rows, self.operands, list(self.per_row), self.registers)

    @property
    def results(self) -> int:
        """How many there are."""
        return len(self.per_row)

    @cached_property
    def row_axes(self) -> int:
        """How many of the last axes make a row; 0 if all is elementwise."""
        return _row_axes(self.rows)


def _row_axes(rows: Sequence[tuple[str, tuple[int, ...], float]]) -> int:
    return max((int(number) for name, _, number in rows if name in ROWS), default=0)


def narrowed(shape: Sequence[int], axes: int) -> tuple[int, ...]:
    """A shape with one element a row of so many axes."""
    return (*shape[: len(shape) - axes], *(1,) * axes)


class Builder:
    """Puts instructions together: equal ones are one, numbers are folded.

    ``joined``: a product that is added to something is one instruction with that, and is not rounded in between. What
    cancels to the last bit otherwise need not do so then.

    Examples:
        >>> b = Builder(operands=1)
        >>> x = b.operand(0)
        >>> twice = b.multiply(b.add(x, 0.0), 2.0)
        >>> b.program([twice]).rows
        (('mul_i', (1, 0), 2.0),)
    """

    def __init__(self, operands: int, joined: bool = False) -> None:
        self.operands, self.joined = operands, joined
        self._rows: list[tuple[str, tuple[int, ...], float]] = []  # the k-th makes place operands + k
        self._made: dict[tuple[str, tuple[int, ...], float], Value] = {}

    @property
    def row_axes(self) -> int:
        """How many of the last axes make a row so far."""
        return _row_axes(self._rows)

    def operand(self, k: int) -> Value:
        """The k-th operand."""
        return Value(k)

    def emit(self, name: str, *arguments: Value, number: float = 0.0) -> Value:
        """One instruction as it is."""
        row = (name, tuple(a.place for a in arguments), number)
        if row not in self._made:
            self._made[row] = Value(self.operands + len(self._rows))
            self._rows.append(row)
        return self._made[row]

    def dense(self, x: Scalar) -> Value:
        """A number as a register full of it."""
        return x if isinstance(x, Value) else self.emit("fill", number=x)

    def _commutative(self, name: str, fold: Callable[[float, float], float], neutral: float, *given: Scalar) -> Scalar:
        values = [x for x in given if isinstance(x, Value)]
        numbers = [x for x in given if not isinstance(x, Value)]
        if not values:
            return fold(*numbers)
        if not numbers:
            return self.emit(name, *values)
        return values[0] if numbers[0] == neutral else self.emit(f"{name}_i", *values, number=numbers[0])

    def _factors(self, x: Scalar) -> tuple[Value, Value] | None:
        """Of what is a product, where those are joined to sums."""
        if not self.joined or not isinstance(x, Value) or x.place < self.operands:
            return None
        name, arguments, _ = self._rows[x.place - self.operands]
        return (Value(arguments[0]), Value(arguments[1])) if name == "mul" else None

    def add(self, x: Scalar, y: Scalar) -> Scalar:
        """x + y."""
        for one, other in ((x, y), (y, x)):
            if isinstance(other, Value) and (factors := self._factors(one)):
                return self.emit("fma", *factors, other)
        return self._commutative("add", operator.add, 0.0, x, y)

    def subtract(self, x: Scalar, y: Scalar) -> Scalar:
        """x − y."""
        if isinstance(x, Value) and (factors := self._factors(y)):
            return self.emit("fnma", *factors, x)
        if isinstance(y, Value):
            return self.emit("sub", x, y) if isinstance(x, Value) else self.emit("rsub_i", y, number=x)
        return self.add(x, -y)

    def multiply(self, x: Scalar, y: Scalar) -> Scalar:
        """x y."""
        return self._commutative("mul", operator.mul, 1.0, x, y)

    def divide(self, x: Scalar, y: Scalar) -> Scalar:
        """x / y."""
        if isinstance(y, Value):
            return self.emit("div", x, y) if isinstance(x, Value) else self.emit("rdiv_i", y, number=x)
        return self.emit("div", self.dense(x), self.dense(y)) if y == 0 else self.multiply(x, 1 / y)

    def fused(self, x: Scalar, y: Scalar, z: Scalar) -> Scalar:
        """x y + z."""
        if isinstance(x, Value) and isinstance(y, Value) and isinstance(z, Value):
            return self.emit("fma", x, y, z)
        return self.add(self.multiply(x, y), z)

    def apply(self, name: str, x: Scalar) -> Scalar:
        """A function of one element."""
        return self.emit(name, self.dense(x))

    def program(self, results: Sequence[Value], per_row: Collection[Value] = ()) -> Program:
        """What makes ``results``, each a value of its own; registers are reused as soon as they are free.

        Of those in ``per_row`` one element a row is kept.
        """
        assert len(set(results)) == len(results) and all(value.place >= self.operands for value in results)
        wanted = {value.place for value in results}
        for k in reversed(range(len(self._rows))):
            if self.operands + k in wanted:
                wanted.update(self._rows[k][1])
        last = {a: k for k, row in enumerate(self._rows) if self.operands + k in wanted for a in row[1]}
        slots: dict[int, int] = {k: k for k in range(self.operands)}
        slots |= {value.place: self.operands + n for n, value in enumerate(results)}
        free, registers, rows = list[int](), 0, list[tuple[str, tuple[int, ...], float]]()
        first = self.operands + len(results)
        for k, (name, arguments, number) in enumerate(self._rows):
            place = self.operands + k
            if place not in wanted:
                continue
            taken = tuple(slots[a] for a in arguments)
            free += {slots[a] for a in arguments if last[a] == k and slots[a] >= first}
            if place not in slots:
                if not free:
                    free.append(first + registers)
                    registers += 1
                slots[place] = free.pop()
            rows.append((name, (slots[place], *taken), number))
        return Program(tuple(rows), self.operands, tuple(value in per_row for value in results), registers)


__all__ = ["ROWS", "Builder", "Program", "Scalar", "Value", "narrowed"]
