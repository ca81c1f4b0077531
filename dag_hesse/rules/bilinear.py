"""Rules of products of two operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from dag_hesse.ir.node import Kind, Node
from dag_hesse.rules.base import (
    ALL,
    Buffers,
    Call,
    Linearized,
    Pairs,
    Residual,
    Rule,
    Run,
    Samples,
    Shapes,
    Tangents,
    as_it_is,
    no_workspace,
)
from dag_hesse.rules.linear import shell

Product = Callable[[Call, Tensor, Tensor, Tensor | None], Tensor]
Terms = Sequence[tuple[Tensor, Tensor]]
Outer = Callable[[Call, Terms, Tensor | None], Tensor]
Keep = Callable[[Call, int, Tensor], Tensor]


def _as_it_is(call: Call, slot: int, value: Tensor) -> Tensor:
    return value.unsqueeze(0)


@dataclass(frozen=True, slots=True)
class _Residual:
    """Tangents that second-order terms take: of a for b's, and of b for a's; or b's term itself, made ``early``."""

    a: Tensor | None
    b: Tensor | None
    early: Tensor | None


@final
class _Bilinear(Linearized):
    def __init__(
        self, call: Call, product: Product, left: Product, right: Outer, keep: Keep, early: Callable[[Call], bool]
    ) -> None:
        a_on, b_on = call.active[0], call.active[1]
        self.early = a_on and b_on and early(call)
        self.call = replace(call, values=tuple(shell(v) for v in call.values), value=shell(call.value))
        self.a = keep(call, 0, call.values[0]) if b_on else None
        self.b = keep(call, 1, call.values[1]) if a_on else None
        self.product, self.left, self.right = product, left, right
        self.lam: Tensor | None = None

    def bind(self, lam: Tensor | None, slots: Sequence[int], into: Buffers) -> dict[int, Tensor]:
        self.lam = lam if self.call.curved else None
        return super().bind(lam, slots, into)

    def push(self, tangents: Tangents, onward: bool, curved: Sequence[int]) -> tuple[Tensor | None, Residual]:
        a = tangents.get(0) if self.lam is not None and 1 in curved else None
        b = tangents.get(1) if self.lam is not None and 0 in curved else None
        early = None
        moved = self._move(tangents) if onward else None
        if a is not None and self.early:
            a, early = None, self._outer([(self.lam, a)], None)
        return moved, (None if a is b is early else _Residual(a, b, early))

    def _move(self, tangents: Tangents) -> Tensor:
        total: Tensor | None = None
        if 0 in tangents:
            assert self.b is not None
            total = self.product(self.call, tangents[0], self.b, None)
        if 1 in tangents:
            assert self.a is not None
            total = self.product(self.call, self.a, tangents[1], total)
        if 2 not in tangents:
            assert total is not None
            return total
        bias = self._spread_bias(tangents[2])
        return bias if total is None else total.add_(bias)  # a product's memory is its own

    def pull(
        self, abar: Tensor | None, residual: Residual, rows: slice, slots: Sequence[int], into: Buffers
    ) -> dict[int, Tensor]:
        kept = residual or _Residual(None, None, None)
        adjoints = (self._of_first, self._of_second, self._of_bias)
        found = {slot: adjoints[slot](abar, kept, rows) for slot in slots}
        return {slot: x for slot, x in found.items() if x is not None}

    def _of_first(self, abar: Tensor | None, residual: _Residual, rows: slice) -> Tensor | None:
        x = None if abar is None else self._inner(abar, self.b, None)
        if residual.b is None:
            return x
        if x is None:
            return self._inner(self.lam, residual.b, None)
        self._inner(self.lam, residual.b, x[rows])
        return x

    def _of_second(self, abar: Tensor | None, residual: _Residual, rows: slice) -> Tensor | None:
        second = [] if residual.a is None else [(self.lam, residual.a)]
        if abar is None:
            return self._outer(second, None) if second else residual.early
        if rows == ALL:  # one product of both
            return self._outer([(abar, self.a), *second], residual.early)
        x = self._outer([(abar, self.a)], None)
        if residual.early is not None:
            x[rows] += residual.early
        elif second:
            self._outer(second, x[rows])
        return x

    def _of_bias(self, abar: Tensor | None, residual: _Residual, rows: slice) -> Tensor | None:
        return None if abar is None else abar.sum([1, *range(3, abar.ndim)])

    def _inner(self, abar: Tensor | None, b: Tensor | None, into: Tensor | None) -> Tensor:
        assert abar is not None and b is not None
        return self.left(self.call, abar, b, into)

    def _outer(self, terms: Sequence[tuple[Tensor | None, Tensor | None]], into: Tensor | None) -> Tensor:
        pairs = [(abar, a) for abar, a in terms if abar is not None and a is not None]
        assert len(pairs) == len(terms)
        return self.right(self.call, pairs, into)

    def _spread_bias(self, bias: Tensor) -> Tensor:
        shape = self.call.value.shape
        return bias.reshape(bias.shape[0], 1, -1, *(1,) * (len(shape) - 2)).expand(bias.shape[0], *shape)


def _smaller(call: Call) -> bool:
    """Whether the second operand is smaller than the first."""
    return call.values[1].numel() < call.values[0].numel()


def bilinear(
    product: Product,
    left: Product,
    right: Outer,
    keep: Keep = _as_it_is,
    run: Run = as_it_is,
    early: Callable[[Call], bool] = _smaller,
    *,
    samples: Samples = Samples.PRODUCT,
    flops: Callable[[Node, Shapes], int],
    workspace: Callable[[Node, Shapes, int], int] = no_workspace,
    unpooled: Callable[[Node, Shapes, int], int] = no_workspace,
) -> Rule:
    """A product of two operands, with an optional third input added per image channel (a convolution's bias).

    ``product(call, a, b, into)``, ``left(call, abar, b, into)`` (transpose in a) and ``right(call, [(abar, a), …],
    into)`` (transposes in b, summed) take operands with a leading probe axis, of size 1 where the operand is the same
    for all probes; the result is added to ``into`` where that is given.
    ``keep(call, slot, value)`` gives an operand that axis, in the memory layout that the products like; ``run`` gives
    the op's own result one. ``early(call)``: the product of λ and ȧ is taken in the tangent pass, as it is smaller than
    ȧ, which need not be kept then.
    """

    def pairs(node: Node) -> Pairs:
        return frozenset({(0, 1), (1, 0)})

    return Rule(
        Kind.CONTRACTION,
        lambda call: _Bilinear(call, product, left, right, keep, early),
        pairs,
        samples,
        run=run,
        flops=flops,
        workspace=workspace,
        unpooled=unpooled,
    )


__all__ = ["Product", "Terms", "bilinear"]
