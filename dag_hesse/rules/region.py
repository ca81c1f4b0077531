"""A region: elementwise ops collapsed into one node, linearized as one (design §3, fuse).

Where all active inputs meet in one sum z first, tangents and adjoints are added there and the rest is a function of z
alone; otherwise first partials c_i and λ-weighted second partials h_ij are dense in the region's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from dag_hesse.ir.node import Kind, Node, execute
from dag_hesse.kernels.pointwise import Coefficient, add_times, adjoint, curvature, reduce_to, tangent, times
from dag_hesse.rules.base import Call, Linearized, Note, Pairs, Rule, Tangents, added
from dag_hesse.rules.chain import Collapsed, Descent, collapse, is_active, rule_of


@dataclass(frozen=True)
class Region:
    """The ops of a region in order. Their inputs are numbered: the region's own inputs first, then its members.

    ``meet`` is the member where all that is active has come together linearly; None where there is no such member.
    Call it with the inputs' values to get the last member's.
    """

    inputs: int
    members: tuple[Node, ...]
    meet: int | None

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.values(inputs)[-1]

    def values(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Values of the inputs and of all members."""
        known = list(inputs)
        for member in self.members:
            known.append(execute(member, [known[k] for k in member.inputs]))
        return known

    def __str__(self) -> str:
        return " ".join(member.op.split(".")[1] for member in self.members)

    __repr__ = __str__


def _pairs(node: Node) -> Pairs:
    """Input pairs that some member brings together nonlinearly."""
    region: Region = node.target  # type: ignore[assignment]
    reach = [frozenset({k}) for k in range(region.inputs)]
    found: set[tuple[int, int]] = set()
    for member in region.members:
        sources = [reach[k] for k in member.inputs]
        live = is_active(member)
        reach.append(frozenset().union(*sources) if live else frozenset())
        for p, q in rule_of(member).pairs(member) if live else ():
            found |= {(i, j) for i in sources[p] for j in sources[q]}
    return frozenset(found)


@final
class _Meeting(Linearized):
    """z = Σ a_i x_i, y = φ(z): c = φ'(z), h = λ φ''(z)."""

    def __init__(self, call: Call, shares: dict[int, Coefficient], tail: Collapsed | None) -> None:
        self.shares, self.tail = shares, tail
        self.shapes, self.out_shape = [v.shape for v in call.values[: len(call.active)]], call.out.shape
        self._c: Coefficient | None = 1.0 if tail is None else None
        self.h: Coefficient | None = None

    @property
    def c(self) -> Coefficient:
        if self._c is None:
            assert self.tail is not None
            self._c = self.tail.first[0]
        return self._c

    def _meet(self, tangents: Tangents) -> Tensor:
        return tangent([self.shares.get(slot) for slot in range(len(self.shapes))], tangents, self.out_shape)

    def push(self, tangents: Tangents, slots: Sequence[int]) -> tuple[Tensor, Note]:
        met = self._meet(tangents)
        return times(self.c, met), None if self.h is None else met

    def jvp(self, tangents: Tangents) -> Tensor:
        return times(self.c, self._meet(tangents))

    def note(self, tangents: Tangents, slots: Sequence[int]) -> Note:
        return None if self.h is None else self._meet(tangents)

    def reads(self, slot: int) -> bool:
        return False

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        return adjoint(self.shares[slot], times(self.c, cotangent), self.shapes[slot])

    def curve(self, lam: Tensor, pulled: Tangents) -> None:
        if self.tail is not None:
            self._adopt(self.tail.descend(lam, ()))

    def settle(self) -> None:
        self._c, self.tail = self.c, None

    def _adopt(self, descent: Descent) -> dict[int, Tensor]:
        self._c, self.h, self.tail = descent.first[0], descent.second.get((0, 0)), None
        return descent.pulled

    def descend(self, lam: Tensor, slots: Sequence[int], *, curved: bool) -> dict[int, Tensor]:
        if self.tail is None or not curved:
            return super().descend(lam, slots, curved=curved)
        pulled = self._adopt(self.tail.descend(lam, [0] if slots else []))
        return {slot: adjoint(self.shares[slot], pulled[0][None], self.shapes[slot])[0] for slot in slots}

    def second(self, tangents: Tangents, note: Note, slot: int, into: Tensor | None = None) -> Tensor | None:
        found = self.pull(None, tangents, [slot], slice(None), note).get(slot)
        return None if found is None else added(found, into)

    def pull(
        self, cotangent: Tensor | None, tangents: Tangents, slots: Sequence[int], rows: slice, note: Note
    ) -> dict[int, Tensor]:
        at_z = None if cotangent is None else times(self.c, cotangent)
        if note is not None and self.h is not None:
            if at_z is None or cotangent is None:
                at_z = times(self.h, note)
            else:
                at_z = cotangent.clone() if at_z is cotangent else at_z
                add_times(at_z[rows], self.h, note)
        if at_z is None:
            return {}
        return {slot: adjoint(self.shares[slot], at_z, self.shapes[slot]) for slot in slots}


@final
class _Dense(Linearized):
    """y = φ(x_1 … x_k) with partials in every input."""

    def __init__(self, call: Call, sources: Sequence[int], collapsed: Collapsed) -> None:
        self.sources, self.number = sources, {slot: i for i, slot in enumerate(sources)}
        self.collapsed: Collapsed | None = collapsed
        self._first: list[Coefficient | None] | None = None
        self.shapes, self.out_shape = [v.shape for v in call.values[: len(call.active)]], call.out.shape
        self.seconds: dict[tuple[int, int], Coefficient] = {}

    @property
    def first(self) -> list[Coefficient | None]:
        """c_i, per input slot."""
        if self._first is None:
            assert self.collapsed is not None
            self._first = self._by_slot(self.collapsed.first)
        return self._first

    def _by_slot(self, first: dict[int, Coefficient]) -> list[Coefficient | None]:
        return [first.get(self.number.get(slot, -1)) for slot in range(len(self.shapes))]

    def jvp(self, tangents: Tangents) -> Tensor:
        return tangent(self.first, tangents, self.out_shape)

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        partial = self.first[slot]
        assert partial is not None
        return adjoint(partial, cotangent, self.shapes[slot])

    def curve(self, lam: Tensor, pulled: Tangents) -> None:
        if self.collapsed is not None:
            self._adopt(self.collapsed.descend(lam, ()))

    def settle(self) -> None:
        self._first, self.collapsed = self.first, None

    def _adopt(self, descent: Descent) -> dict[int, Tensor]:
        self._first, self.collapsed = self._by_slot(descent.first), None
        self.seconds = {(self.sources[i], self.sources[j]): h for (i, j), h in descent.second.items()}
        return descent.pulled

    def descend(self, lam: Tensor, slots: Sequence[int], *, curved: bool) -> dict[int, Tensor]:
        if self.collapsed is None or not curved:
            return super().descend(lam, slots, curved=curved)
        pulled = self._adopt(self.collapsed.descend(lam, [self.number[slot] for slot in slots]))
        return {slot: reduce_to(pulled[self.number[slot]][None], self.shapes[slot])[0] for slot in slots}

    def second(self, tangents: Tangents, note: Note, slot: int, into: Tensor | None = None) -> Tensor | None:
        return curvature(self.seconds, tangents, slot, self.shapes[slot], self.out_shape, into)


def linearize(call: Call) -> Linearized:
    region: Region = call.node.target  # type: ignore[assignment]
    known = dict(enumerate([*call.values, call.out]))
    members = list(enumerate(region.members, region.inputs))
    active = [slot for slot, on in enumerate(call.active) if on]
    if region.meet is None:
        return _Dense(call, active, collapse(members, known, active))
    front, tail = members[: region.meet + 1], members[region.meet + 1 :]
    shares = collapse(front, known, active).first
    return _Meeting(
        call, {active[i]: a for i, a in shares.items()}, collapse(tail, known, [front[-1][0]]) if tail else None
    )


REGION = Rule(Kind.POINTWISE, linearize, _pairs)

__all__ = ["REGION", "Region"]
