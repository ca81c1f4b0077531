"""What a rule is, and the constructors named after the kind of rule.

A rule is *linearized* once, on the values of one call; after that it is a set of linear products. Every product
carries one leading probe axis: tangents are (probes, *input), cotangents (probes, *output).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Node, Ref, execute
from dag_hesse.kernels.pointwise import adjoint as diagonal_adjoint
from dag_hesse.kernels.pointwise import curvature as diagonal_curvature
from dag_hesse.kernels.pointwise import tangent as diagonal_tangent

Tangents = Mapping[int, Tensor]
Pairs = frozenset[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Call:
    """One node with the values it had: what a rule is linearized on.

    Attributes:
        node: the node.
        values: one tensor per input slot.
        out: the node's own value.
        active: per slot, whether a point reaches that input.
    """

    node: Node
    values: tuple[Tensor, ...]
    out: Tensor
    active: tuple[bool, ...]

    def shape(self, slot: int = 0) -> torch.Size:
        """Shape of the ``slot``-th tensor input."""
        return self.values[slot].shape

    def argument(self, position: int, name: str = "", default: Any = None) -> Any:
        """The op's argument at ``position`` (or keyword ``name``), tensors put in."""
        if position < len(self.node.args):
            arg = self.node.args[position]
        else:
            arg = self.node.kwargs.get(name, default)
        if isinstance(arg, Ref):
            return self.values[arg.slot]
        return arg

    def slot(self, position: int) -> int | None:
        """The input slot of the argument at ``position``; None if it is not a tensor."""
        arg = self.node.args[position] if position < len(self.node.args) else None
        return arg.slot if isinstance(arg, Ref) else None


class Linearized(ABC):
    """A call after linearization: linear maps, and (after :meth:`curve`) the λ-weighted second-order term."""

    @abstractmethod
    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the output tangent Σ_i D_i ẋ_i, (probes, *output)."""

    @abstractmethod
    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        """Return D_slotᵀ ā, (probes, *input)."""

    def curve(self, lam: Tensor) -> None:  # noqa: B027  (linear calls have nothing to keep)
        """Keep what the second-order term needs of the adjoint λ = ∂L/∂output, (*output)."""

    def second(self, tangents: Tangents, slot: int) -> Tensor | None:
        """Return Σ_j (T[slot, j]·λ) ẋ_j, (probes, *input); None if it is zero."""
        return None


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table: the kind, how a call is linearized, which slot pairs have a second derivative."""

    kind: Kind
    linearize: Callable[[Call], Linearized]
    pairs: Callable[[Node], Pairs]


def no_pairs(node: Node) -> Pairs:
    """The op is linear in its tensor inputs jointly (or piecewise so)."""
    return frozenset()


def own_pair(node: Node) -> Pairs:
    """The op is nonlinear in its one differentiable input."""
    return frozenset({(0, 0)})


# --- linear ---------------------------------------------------------------------------------------------------------

Transpose = Callable[[Call, Tensor, int], Tensor]
Forward = Callable[[Call, tuple[Tensor, ...]], Tensor]


def _run(call: Call, inputs: tuple[Tensor, ...]) -> Tensor:
    return execute(call.node, inputs)


@final
class _Linear(Linearized):
    def __init__(self, call: Call, forward: Forward, transpose: Transpose) -> None:
        # Shapes are all that is needed of the active inputs: let their storage go.
        kept = tuple(
            v.new_empty(()).expand(v.shape) if on else v for v, on in zip(call.values, call.active, strict=True)
        )
        self.call = Call(call.node, kept, call.out.new_empty(()).expand(call.out.shape), call.active)
        self.forward, self.transpose = forward, transpose

    def jvp(self, tangents: Tangents) -> Tensor:
        slots = sorted(tangents)

        def apply(*given: Tensor) -> Tensor:
            inputs = list(self.call.values)
            for slot, value in enumerate(inputs):
                if value.is_floating_point():
                    inputs[slot] = torch.zeros_like(value)
            for slot, xdot in zip(slots, given, strict=True):
                inputs[slot] = xdot
            return self.forward(self.call, tuple(inputs))

        return torch.vmap(apply)(*(tangents[slot] for slot in slots))

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        return torch.vmap(lambda g: self.transpose(self.call, g, slot))(cotangent)


def linear(transpose: Transpose, forward: Forward = _run, kind: Kind = Kind.STRUCTURAL) -> Rule:
    """An op linear in its floating-point inputs jointly; ``transpose(call, cotangent, slot)`` is its adjoint.

    Both maps are written for one probe; they must not read the values of active inputs, only their shapes.
    """
    return Rule(kind, lambda call: _Linear(call, forward, transpose), no_pairs)


# --- pointwise ------------------------------------------------------------------------------------------------------

Coefficient = Tensor | float
Partials = Callable[[Call], tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]]


@final
class _Diagonal(Linearized):
    def __init__(self, call: Call, partials: Partials) -> None:
        first, self.raw = partials(call)
        self.first = [first.get(slot) for slot in range(len(call.values))]
        self.shapes = [value.shape for value in call.values]
        self.out_shape = call.out.shape
        self.seconds: dict[tuple[int, int], Coefficient] = {}

    def jvp(self, tangents: Tangents) -> Tensor:
        return diagonal_tangent(self.first, tangents, self.out_shape)

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        partial = self.first[slot]
        assert partial is not None
        return diagonal_adjoint(partial, cotangent, self.shapes[slot])

    def curve(self, lam: Tensor) -> None:
        self.seconds = {pair: h * lam for pair, h in self.raw.items()}
        self.raw = {}

    def second(self, tangents: Tangents, slot: int) -> Tensor | None:
        return diagonal_curvature(self.seconds, tangents, slot, self.shapes[slot], self.out_shape)


def diagonal(kind: Kind, partials: Partials, pairs: Callable[[Node], Pairs]) -> Rule:
    """An elementwise op (with broadcasting) given by its first and second partials."""
    return Rule(kind, lambda call: _Diagonal(call, partials), pairs)


Derivative = Callable[[Call], Coefficient]


def pointwise(d1: Derivative, d2: Derivative) -> Rule:
    """A smooth unary op with derivatives d1 and d2 as functions of the call (``values[0]`` is x, ``out`` is y)."""
    return diagonal(Kind.POINTWISE, lambda c: ({0: d1(c)}, {(0, 0): d2(c)}), own_pair)


def piecewise_linear(d1: Derivative) -> Rule:
    """A unary op with second derivative 0 almost everywhere."""
    return diagonal(Kind.PIECEWISE_LINEAR, lambda c: ({0: d1(c)}, {}), no_pairs)


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
        a, b, y = call.argument(0), call.argument(1, "other"), call.out
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


# --- bilinear -------------------------------------------------------------------------------------------------------

Product = Callable[[Call, Tensor, Tensor], Tensor]


@final
class _Bilinear(Linearized):
    def __init__(self, call: Call, product: Product, left: Product, right: Product) -> None:
        a_on, b_on = call.active[0], call.active[1]
        self.call = Call(
            call.node,
            tuple(torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") for v in call.values),
            call.out.to("meta"),
            call.active,
        )
        self.a = call.values[0].unsqueeze(0) if b_on else None
        self.b = call.values[1].unsqueeze(0) if a_on else None
        self.product, self.left, self.right = product, left, right
        self.lam: Tensor | None = None

    def jvp(self, tangents: Tangents) -> Tensor:
        terms = []
        if 0 in tangents:
            assert self.b is not None
            terms.append(self.product(self.call, tangents[0], self.b))
        if 1 in tangents:
            assert self.a is not None
            terms.append(self.product(self.call, self.a, tangents[1]))
        if not terms:
            return self._spread_bias(tangents[2])
        total = terms[0]
        for term in terms[1:]:
            total.add_(term)  # a product's memory is its own
        return total.add_(self._spread_bias(tangents[2])) if 2 in tangents else total

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        if slot == 0:
            assert self.b is not None
            return self.left(self.call, cotangent, self.b)
        if slot == 1:
            assert self.a is not None
            return self.right(self.call, cotangent, self.a)
        return cotangent.sum([1, *range(3, cotangent.ndim)])

    def curve(self, lam: Tensor) -> None:
        self.lam = lam.unsqueeze(0)

    def second(self, tangents: Tangents, slot: int) -> Tensor | None:
        if self.lam is None or slot > 1 or (1 - slot) not in tangents:
            return None
        return (self.left if slot == 0 else self.right)(self.call, self.lam, tangents[1 - slot])

    def _spread_bias(self, bias: Tensor) -> Tensor:
        out = self.call.out.shape
        return bias.reshape(bias.shape[0], 1, -1, *(1,) * (len(out) - 2)).expand(bias.shape[0], *out)


def bilinear(product: Product, left: Product, right: Product) -> Rule:
    """A product of two operands, with an optional third input added per channel (a convolution's bias).

    ``product(call, a, b)``, ``left(call, cotangent, b)`` (adjoint in a) and ``right(call, cotangent, a)`` (adjoint
    in b) take operands with a leading probe axis, of size 1 where the operand is the same for all probes.
    """

    def pairs(node: Node) -> Pairs:
        return frozenset({(0, 1), (1, 0)})

    return Rule(Kind.CONTRACTION, lambda call: _Bilinear(call, product, left, right), pairs)
