"""Rules of products of two operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor

from dag_hesse.ir.node import Kind, Node, execute
from dag_hesse.rules.base import Call, Linearized, Note, Pairs, Rule, Run, Tangents, added
from dag_hesse.rules.linear import shell

Product = Callable[[Call, Tensor, Tensor, Tensor | None], Tensor]
Terms = Sequence[tuple[Tensor, Tensor]]
Outer = Callable[[Call, Terms, Tensor | None], Tensor]
Keep = Callable[[Call, int, Tensor], Tensor]


def _as_it_is(call: Call, slot: int, value: Tensor) -> Tensor:
    return value.unsqueeze(0)


@final
class _Bilinear(Linearized):
    def __init__(
        self, call: Call, product: Product, left: Product, right: Outer, keep: Keep, early: Callable[[Call], bool]
    ) -> None:
        a_on, b_on = call.active[0], call.active[1]
        self.early = a_on and b_on and early(call)
        self.call = Call(call.node, tuple(shell(v) for v in call.values), shell(call.out), call.active)
        self.a = keep(call, 0, call.values[0]) if b_on else None
        self.b = keep(call, 1, call.values[1]) if a_on else None
        self.product, self.left, self.right = product, left, right
        self.lam: Tensor | None = None

    def jvp(self, tangents: Tangents) -> Tensor:
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

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        if slot == 0:
            assert self.b is not None
            return self.left(self.call, cotangent, self.b, None)
        if slot == 1:
            assert self.a is not None
            return self.right(self.call, [(cotangent, self.a)], None)
        return cotangent.sum([1, *range(3, cotangent.ndim)])

    def curve(self, lam: Tensor, pulled: Tangents) -> None:
        self.lam = lam.unsqueeze(0)

    def reads(self, slot: int) -> bool:
        return slot == 1 or (slot == 0 and not self.early)

    def note(self, tangents: Tangents, slots: Sequence[int]) -> Note:
        if not self.early or self.lam is None or 0 not in tangents or 1 not in slots:
            return None
        return self.right(self.call, [(self.lam, tangents[0])], None)

    def second(self, tangents: Tangents, note: Note, slot: int, into: Tensor | None = None) -> Tensor | None:
        if self.lam is None or slot > 1:
            return None
        if slot == 0:
            return self.left(self.call, self.lam, tangents[1], into) if 1 in tangents else None
        if note is not None:
            return added(note, into)
        return self.right(self.call, [(self.lam, tangents[0])], into) if 0 in tangents else None

    def bent_vjp(self, cotangent: Tensor, tangents: Tangents, note: Note, slot: int, rows: slice) -> Tensor:
        if slot == 1 and rows == slice(None) and self.a is not None:
            if note is not None:
                return self.right(self.call, [(cotangent, self.a)], note)
            if self.lam is not None and 0 in tangents:
                return self.right(self.call, [(cotangent, self.a), (self.lam, tangents[0])], None)
        return super().bent_vjp(cotangent, tangents, note, slot, rows)

    def _spread_bias(self, bias: Tensor) -> Tensor:
        out = self.call.out.shape
        return bias.reshape(bias.shape[0], 1, -1, *(1,) * (len(out) - 2)).expand(bias.shape[0], *out)


def _smaller(call: Call) -> bool:
    """Whether the second operand is smaller than the first."""
    return call.values[1].numel() < call.values[0].numel()


def bilinear(
    product: Product,
    left: Product,
    right: Outer,
    keep: Keep = _as_it_is,
    run: Run = execute,
    early: Callable[[Call], bool] = _smaller,
) -> Rule:
    """A product of two operands, with an optional third input added per channel (a convolution's bias).

    ``product(call, a, b, into)``, ``left(call, cotangent, b, into)`` (adjoint in a) and ``right(call, [(cotangent, a),
    …], into)`` (adjoints in b, summed) take operands with a leading probe axis, of size 1 where the operand is the same
    for all probes; the result is added to ``into`` where that is given.
    ``keep(call, slot, value)`` gives an operand that axis, in the memory layout that the products like; ``run`` gives
    the op's own result one. ``early(call)``: the product of λ and ȧ is taken in the tangent pass, as it is smaller than
    ȧ, which need not be kept then.
    """

    def pairs(node: Node) -> Pairs:
        return frozenset({(0, 1), (1, 0)})

    return Rule(Kind.CONTRACTION, lambda call: _Bilinear(call, product, left, right, keep, early), pairs, run=run)


__all__ = ["Product", "Terms", "bilinear"]
