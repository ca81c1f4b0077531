"""What a rule is, and the constructors named after the kind of rule.

A rule is *linearized* once, on the values of one call; after that it is a set of linear products. Every product
carries one leading probe axis: tangents are (probes, *input), cotangents (probes, *output).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Node, Ref, execute
from dag_hesse.kernels.pointwise import Coefficient, times
from dag_hesse.kernels.pointwise import adjoint as diagonal_adjoint
from dag_hesse.kernels.pointwise import curvature as diagonal_curvature
from dag_hesse.kernels.pointwise import tangent as diagonal_tangent

Tangents = Mapping[int, Tensor]
Pairs = frozenset[tuple[int, int]]
Note = Any  # what a call leaves of a tangent pass for the adjoint pass that follows
Run = Callable[[Node, Sequence[Tensor]], Tensor]
Partials = Callable[["Call"], tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]]


@dataclass(frozen=True, slots=True)
class Call:
    """One node with the values it had: what a rule is linearized on.

    Attributes:
        node: the node.
        values: one tensor per input slot; for a region, its members' values follow.
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

    def curve(self, lam: Tensor, pulled: Tangents) -> None:  # noqa: B027  (linear calls have nothing to keep)
        """Keep what the second-order term needs of the adjoint λ = ∂L/∂output, (*output).

        ``pulled`` are the inputs' adjoints that come of λ, (*input), for some slots: what is kept of them costs no
        memory, as the calls that they are λ of keep them too.
        """

    def reads(self, slot: int) -> bool:
        """Whether the second-order term is found from that input's tangent (and not from the note alone)."""
        return True

    def note(self, tangents: Tangents, slots: Sequence[int]) -> Note:
        """What the second-order term at ``slots`` needs of a tangent pass besides the tangents; None for nothing."""
        return None

    def push(self, tangents: Tangents, slots: Sequence[int]) -> tuple[Tensor, Note]:
        """:meth:`jvp` and :meth:`note`."""
        return self.jvp(tangents), self.note(tangents, slots)

    def second(self, tangents: Tangents, note: Note, slot: int, into: Tensor | None = None) -> Tensor | None:
        """Return Σ_j (T[slot, j]·λ) ẋ_j, (probes, *input), added to ``into`` where that is given; None if it is zero.

        ``tangents`` are those that the call :meth:`reads`, ``note`` is :meth:`note` of all.
        """
        return None

    def pull(
        self, cotangent: Tensor | None, tangents: Tangents, slots: Sequence[int], rows: slice, note: Note
    ) -> dict[int, Tensor]:
        """Per slot, D_slotᵀ ā with the second-order term added to its ``rows``; without a cotangent, that term alone.

        No tangents and no note: no second-order term.
        """
        found: dict[int, Tensor] = {}
        for slot in slots:
            if cotangent is None:
                bent = self.second(tangents, note, slot)
                if bent is not None:
                    found[slot] = bent
            elif tangents or note is not None:
                found[slot] = self.bent_vjp(cotangent, tangents, note, slot, rows)
            else:
                found[slot] = self.vjp(cotangent, slot)
        return found

    def bent_vjp(self, cotangent: Tensor, tangents: Tangents, note: Note, slot: int, rows: slice) -> Tensor:
        """:meth:`vjp` with :meth:`second` added to its ``rows``."""
        data = self.vjp(cotangent, slot)
        if is_fresh(data, cotangent):
            self.second(tangents, note, slot, data[rows])
            return data
        bent = self.second(tangents, note, slot)
        if bent is not None:
            data = data.clone(memory_format=torch.contiguous_format)
            data[rows] += bent
        return data


def added(x: Tensor, into: Tensor | None) -> Tensor:
    """``x``, or ``into`` with ``x`` added to it."""
    return x if into is None else into.add_(x)


def is_fresh(x: Tensor, *others: Tensor) -> bool:
    """Whether ``x`` can be written to: it has memory of its own, apart from these tensors, once for every element.

    A product is linear in what it is given, so it is new, or a view of that.
    """
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        return False
    place = x.untyped_storage().data_ptr()
    return all(place != other.untyped_storage().data_ptr() for other in others)


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table: the kind, how a call is linearized, which slot pairs have a second derivative.

    ``partials`` is there for elementwise ops, which may be collapsed into regions; with ``align``, only where nothing
    but their first input is active. ``run`` evaluates the op itself, where a memory layout suits its products.
    """

    kind: Kind
    linearize: Callable[[Call], Linearized]
    pairs: Callable[[Node], Pairs]
    partials: Partials | None = None
    align: Callable[[Call, int], tuple[int, ...]] | None = None
    run: Run = execute


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
        still = [
            torch.zeros_like(value) if value.is_floating_point() and slot not in tangents else value
            for slot, value in enumerate(self.call.values)
        ]

        def apply(*given: Tensor) -> Tensor:
            inputs = list(still)
            for slot, xdot in zip(slots, given, strict=True):
                inputs[slot] = xdot
            return self.forward(self.call, tuple(inputs))

        return _each_probe(apply, *(tangents[slot] for slot in slots))

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        return _each_probe(lambda g: self.transpose(self.call, g, slot), cotangent)


def _each_probe(apply: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """``apply`` for all probes at once; a single one is spared the transformation."""
    if len(given[0]) == 1:
        return apply(*(x[0] for x in given)).unsqueeze(0)
    return torch.vmap(apply)(*given)


def linear(transpose: Transpose, forward: Forward = _run, kind: Kind = Kind.STRUCTURAL) -> Rule:
    """An op linear in its floating-point inputs jointly; ``transpose(call, cotangent, slot)`` is its adjoint.

    Both maps are written for one probe; they must not read the values of active inputs, only their shapes.
    """
    return Rule(kind, lambda call: _Linear(call, forward, transpose), no_pairs)


# --- pointwise ------------------------------------------------------------------------------------------------------

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
        return diagonal_tangent(self.first, self._align(tangents), self.out_shape)

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        partial = self.first[slot]
        assert partial is not None
        data = diagonal_adjoint(partial, cotangent, self.aligned[slot])
        return data.reshape(len(data), *self.shapes[slot])

    def curve(self, lam: Tensor, pulled: Tangents) -> None:
        self.seconds = {pair: times(h, lam) for pair, h in self.raw.items()}
        self.raw = {}

    def second(self, tangents: Tangents, note: Note, slot: int, into: Tensor | None = None) -> Tensor | None:
        aligned = into if into is None else into.view(len(into), *self.aligned[slot])
        data = diagonal_curvature(
            self.seconds, self._align(tangents), slot, self.aligned[slot], self.out_shape, aligned
        )
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


# --- bilinear -------------------------------------------------------------------------------------------------------

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
        self.call = Call(
            call.node,
            tuple(torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") for v in call.values),
            call.out.to("meta"),
            call.active,
        )
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
