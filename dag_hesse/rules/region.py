"""A region: elementwise ops fused into one node, linearized as one (design §3, fuse).

Where all active inputs meet in one sum z first, tangents and adjoints are added there and the rest is a function of z
alone; otherwise first partials c_i and λ-weighted second partials h_ij are dense in the region's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from dag_hesse.ir.node import Kind, Node, execute
from dag_hesse.kernels.elementwise import (
    Adjoint,
    Coefficient,
    Coefficients,
    add_times,
    adjoints,
    reduce_to,
    tangent,
    times,
    transpose,
)
from dag_hesse.rules.base import Buffers, Call, Linearized, Pairs, Residual, Rule, Samples, Tangents
from dag_hesse.rules.chain import Fused, fuse_members, is_active, rule_of
from dag_hesse.rules.elementwise import tangents_met


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
        through = [reach[k] for k in member.inputs]
        active = is_active(member)
        reach.append(frozenset().union(*through) if active else frozenset())
        for p, q in rule_of(member).pairs(member) if active else ():
            found |= {(i, j) for i in through[p] for j in through[q]}
    return frozenset(found)


@final
class _Meeting(Linearized):
    """z = Σ a_i x_i, y = φ(z): c = φ'(z), h = λ φ''(z)."""

    def __init__(self, call: Call, shares: dict[int, Coefficient], tail: Fused | None) -> None:
        self.shares, self.tail, self.curved, self.arena = shares, tail, call.curved, call.arena
        self.shapes = [v.shape for v in call.values[: len(call.active)]]
        self.meeting = Coefficients([shares.get(slot) for slot in range(len(self.shapes))], {}, call.value.shape)
        self.c: Coefficient = 1.0
        self.h: Coefficient | None = None

    def bind(self, lam: Tensor | None, slots: Sequence[int], into: Buffers) -> dict[int, Tensor]:
        tail, self.tail = self.tail, None
        if tail is None:
            return super().bind(lam, slots, into)
        if lam is None or not self.curved:
            self.c = tail.first[0]
            return super().bind(lam, slots, into)
        descent = tail.descend(lam[0], [0] if slots else [])
        self.c, self.h = descent.first[0], descent.second.get((0, 0))
        return self._apart(descent.pulled[0][None], slots) if slots else {}

    def push(self, tangents: Tangents, onward: bool, curved: Sequence[int]) -> tuple[Tensor | None, Residual]:
        met = tangent(self.arena, self.meeting, tangents)
        return times(self.arena, self.c, met) if onward else None, met if curved and self.h is not None else None

    def pull(
        self, abar: Tensor | None, residual: Residual, rows: slice, slots: Sequence[int], into: Buffers
    ) -> dict[int, Tensor]:
        if abar is None:
            return self._apart(times(self.arena, self._second(), residual), slots)
        at_z = times(self.arena, self.c, abar)
        if residual is not None:
            at_z = abar.clone() if at_z is abar else at_z
            add_times(self.arena, at_z[rows], self._second(), residual)
        return self._apart(at_z, slots)

    def _second(self) -> Coefficient:
        assert self.h is not None  # else no residual was saved
        return self.h

    def _apart(self, at_z: Tensor, slots: Sequence[int]) -> dict[int, Tensor]:
        return {slot: transpose(self.arena, self.shares[slot], at_z, self.shapes[slot]) for slot in slots}


@final
class _Dense(Linearized):
    """y = φ(x_1 … x_k) with partials in every input."""

    def __init__(self, call: Call, variables: Sequence[int], fused: Fused) -> None:
        self.variables, self.number = variables, {slot: i for i, slot in enumerate(variables)}
        self.fused: Fused | None = fused
        self.curved, self.arena = call.curved, call.arena
        self.shapes = [v.shape for v in call.values[: len(call.active)]]
        self.of = Coefficients([], {}, call.value.shape)

    def bind(self, lam: Tensor | None, slots: Sequence[int], into: Buffers) -> dict[int, Tensor]:
        fused, self.fused = self.fused, None
        assert fused is not None
        if lam is None or not self.curved:
            self.of = self.of._replace(first=self._by_slot(fused.first))
            return super().bind(lam, slots, into)
        descent = fused.descend(lam[0], [self.number[slot] for slot in slots])
        seconds = {(self.variables[i], self.variables[j]): h for (i, j), h in descent.second.items()}
        self.of = self.of._replace(first=self._by_slot(descent.first), seconds=seconds)
        return {slot: reduce_to(descent.pulled[self.number[slot]][None], self.shapes[slot]) for slot in slots}

    def _by_slot(self, first: dict[int, Coefficient]) -> list[Coefficient | None]:
        return [first.get(self.number.get(slot, -1)) for slot in range(len(self.shapes))]

    def push(self, tangents: Tangents, onward: bool, curved: Sequence[int]) -> tuple[Tensor | None, Residual]:
        moved = tangent(self.arena, self.of, tangents) if onward else None
        return moved, tangents_met(self.of.seconds, tangents, curved)

    def pull(
        self, abar: Tensor | None, residual: Residual, rows: slice, slots: Sequence[int], into: Buffers
    ) -> dict[int, Tensor]:
        wanted = {slot: self.shapes[slot] for slot in slots}
        return adjoints(self.arena, self.of, Adjoint(abar, residual or {}, rows, wanted))


def linearize(call: Call) -> Linearized:
    region: Region = call.node.target  # type: ignore[assignment]
    known = dict(enumerate([*call.values, call.value]))
    members = list(enumerate(region.members, region.inputs))
    active = [slot for slot, on in enumerate(call.active) if on]
    if region.meet is None:
        return _Dense(call, active, fuse_members(members, known, active, call.arena))
    front, tail = members[: region.meet + 1], members[region.meet + 1 :]
    shares = {active[i]: a for i, a in fuse_members(front, known, active, call.arena).first.items()}
    return _Meeting(call, shares, fuse_members(tail, known, [front[-1][0]], call.arena) if tail else None)


REGION = Rule(Kind.SMOOTH, linearize, _pairs, Samples.ELEMENTWISE)

__all__ = ["REGION", "Region"]
