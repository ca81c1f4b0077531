"""What a rule is; its constructors, named after the kinds of rules, are in ``linear``, ``diagonal``, ``bilinear``.

A rule is *linearized* once, on the values of one call; after that it is a set of linear products. Every product
carries one leading probe axis: tangents are (probes, *input), cotangents (probes, *output).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Node, Ref, execute
from dag_hesse.kernels.pointwise import Coefficient

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

    def add_vjp(self, cotangent: Tensor, slot: int, into: Tensor) -> bool:
        """Add D_slotᵀ ā to ``into`` in place, where that is less work than to make it; False: nothing was done."""
        return False

    def curve(self, lam: Tensor, pulled: Tangents) -> None:  # noqa: B027  (linear calls have nothing to keep)
        """Keep what the second-order term needs of the adjoint λ = ∂L/∂output, (*output).

        ``pulled`` are the inputs' adjoints that come of λ, (*input), for some slots: what is kept of them costs no
        memory, as the calls that they are λ of keep them too.
        """

    def descend(self, lam: Tensor, slots: Sequence[int], *, curved: bool) -> dict[int, Tensor]:
        """The inputs' adjoints that come of λ, (*input), per slot; :meth:`curve` where the call is ``curved``."""
        pulled = {slot: x[0] for slot, x in self.pull(lam.unsqueeze(0), {}, slots, slice(None), None).items()}
        if curved:
            self.curve(lam, pulled)
        return pulled

    def settle(self) -> None:  # noqa: B027  (most calls have nothing left to do)
        """λ has come by, or never will: evaluate what is still to be, and give up what that comes of."""

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
