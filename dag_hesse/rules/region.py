"""A region: elementwise ops collapsed into one node, linearized as one (design §3, fuse).

Where all active inputs meet in one sum z first, tangents and adjoints are added there and the rest is a function of z
alone; otherwise first partials c_i and λ-weighted second partials h_ij are dense in the region's inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from dag_hesse.ir.node import Kind, Node, execute
from dag_hesse.kernels.pointwise import (
    Coefficient,
    add_times,
    adjoint,
    curvature,
    plus_product,
    product,
    tangent,
    times,
)
from dag_hesse.rules.base import Call, Linearized, Note, Pairs, Rule, Tangents, added

# A member, its place among the region's values, its first and its second partials.
_Step = tuple[Node, int, dict[int, Coefficient], dict[tuple[int, int], Coefficient]]


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


def _rule(node: Node) -> Rule:
    from dag_hesse.rules.table import RULES  # the table has this file's row in it

    return RULES[node.op]


def _is_active(member: Node) -> bool:
    return member.kind is not Kind.CONST


def _pairs(node: Node) -> Pairs:
    """Input pairs that some member brings together nonlinearly."""
    region: Region = node.target  # type: ignore[assignment]
    reach = [frozenset({k}) for k in range(region.inputs)]
    found: set[tuple[int, int]] = set()
    for member in region.members:
        sources = [reach[k] for k in member.inputs]
        live = _is_active(member)
        reach.append(frozenset().union(*sources) if live else frozenset())
        for p, q in _rule(member).pairs(member) if live else ():
            found |= {(i, j) for i in sources[p] for j in sources[q]}
    return frozenset(found)


@final
class _Meeting(Linearized):
    """z = Σ a_i x_i, y = φ(z): c = φ'(z), h = λ φ''(z)."""

    def __init__(self, call: Call, shares: dict[int, Coefficient], tail: _Collapsed | None) -> None:
        self.shares, self.tail = shares, tail
        self.shapes, self.out_shape = [v.shape for v in call.values[: len(call.active)]], call.out.shape
        self.c: Coefficient = 1.0 if tail is None else tail.first[0]
        self.h: Coefficient | None = None

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
            self.h = self.tail.curvature(lam).get((0, 0))
            self.tail = None

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


class _Collapsed(ABC):
    """First partials of the last member by some sources, and λ-weighted second partials."""

    first: dict[int, Coefficient]

    @abstractmethod
    def curvature(self, lam: Tensor) -> dict[tuple[int, int], Coefficient]: ...


def _steps(region: Region, known: list[Tensor], sources: Sequence[int], start: int) -> Iterator[_Step]:
    """Partials of the members that the sources reach."""
    reached = set(sources)
    for j, member in list(enumerate(region.members))[start:]:
        place = region.inputs + j
        on = tuple(k in reached for k in member.inputs)
        if not _is_active(member) or not any(on):
            continue
        partials = _rule(member).partials
        assert partials is not None
        reached.add(place)
        yield member, place, *partials(Call(member, tuple(known[k] for k in member.inputs), known[place], on))


@final
class _OfOne(_Collapsed):
    """φ(z): φ' and φ'' by the chain rule, member by member; then h = λ φ''."""

    def __init__(self, region: Region, known: list[Tensor], source: int, start: int) -> None:
        d1: dict[int, Coefficient] = {source: 1.0}
        d2: dict[int, Coefficient] = {}
        place = source
        for member, place, first, second in _steps(region, known, [source], start):
            sources = [(slot, k) for slot, k in enumerate(member.inputs) if k in d1]
            d1[place] = _sum_of_products((first[slot], d1[k]) for slot, k in sources)
            terms = [(first[slot], d2[k]) for slot, k in sources if k in d2]
            for (p, q), h in second.items():
                i, j = member.inputs[p], member.inputs[q]
                if i in d1 and j in d1 and p <= q:
                    terms.append((product(product(2.0 if p < q else 1.0, h), d1[i]), d1[j]))
            if terms:
                d2[place] = _sum_of_products(terms)
        self.first, self.second = {0: d1[place]}, d2.get(place)

    def curvature(self, lam: Tensor) -> dict[tuple[int, int], Coefficient]:
        return {} if self.second is None else {(0, 0): product(self.second, lam)}


def _sum_of_products(terms: Iterable[tuple[Coefficient, Coefficient]]) -> Coefficient:
    total: Coefficient | None = None
    for a, b in terms:
        total = product(a, b) if total is None else plus_product(total, a, b)
    assert total is not None
    return total


@final
class _OfSeveral(_Collapsed):
    """φ(x_1 … x_k): D_u of every member u, then Σ_u λ_u φ_u'' D_u D_uᵀ."""

    def __init__(self, region: Region, known: list[Tensor], sources: Sequence[int], start: int) -> None:
        self.own: dict[int, dict[int, Coefficient]] = {k: {i: 1.0} for i, k in enumerate(sources)}
        self.steps = list(_steps(region, known, sources, start))
        for member, place, first, _ in self.steps:
            total: dict[int, Coefficient] = {}
            for slot, k in enumerate(member.inputs):
                for i, c in self.own.get(k, {}).items():
                    total[i] = plus_product(total[i], first[slot], c) if i in total else product(first[slot], c)
            self.own[place] = total
        self.last = region.inputs + len(region.members) - 1
        self.first = self.own[self.last]

    def curvature(self, lam: Tensor) -> dict[tuple[int, int], Coefficient]:
        adjoints: dict[int, Coefficient] = {self.last: lam}
        inner = {place for _, place, _, _ in self.steps}
        found: dict[tuple[int, int], Coefficient] = {}
        for member, place, first, second in reversed(self.steps):
            mine = adjoints.pop(place, None)
            if mine is None:
                continue
            for (p, q), h in second.items():
                left, right = self.own.get(member.inputs[p], {}), self.own.get(member.inputs[q], {})
                weighted = product(h, mine)
                for (i, a), (j, b) in ((x, y) for x in left.items() for y in right.items()):
                    if i <= j:
                        term = product(weighted, a)
                        found[i, j] = plus_product(found[i, j], term, b) if (i, j) in found else product(term, b)
            for slot, k in enumerate(member.inputs):
                if k in inner:
                    adjoints[k] = (
                        plus_product(adjoints[k], first[slot], mine) if k in adjoints else product(first[slot], mine)
                    )
        return found | {(j, i): h for (i, j), h in found.items()}


def _collapsed(region: Region, known: list[Tensor], sources: Sequence[int], start: int) -> _Collapsed:
    """The members from ``start`` on as one function of ``sources``."""
    if len(sources) == 1:
        return _OfOne(region, known, sources[0], start)
    return _OfSeveral(region, known, sources, start)


@final
class _Dense(Linearized):
    """y = φ(x_1 … x_k) with partials in every input."""

    def __init__(self, call: Call, sources: Sequence[int], collapsed: _Collapsed) -> None:
        self.sources = sources
        self.collapsed: _Collapsed | None = collapsed
        self.first = [
            collapsed.first.get(sources.index(slot)) if slot in sources else None for slot in range(len(call.active))
        ]
        self.shapes, self.out_shape = [v.shape for v in call.values[: len(call.active)]], call.out.shape
        self.seconds: dict[tuple[int, int], Coefficient] = {}

    def jvp(self, tangents: Tangents) -> Tensor:
        return tangent(self.first, tangents, self.out_shape)

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        partial = self.first[slot]
        assert partial is not None
        return adjoint(partial, cotangent, self.shapes[slot])

    def curve(self, lam: Tensor, pulled: Tangents) -> None:
        if self.collapsed is not None:
            found = self.collapsed.curvature(lam)
            self.seconds = {(self.sources[i], self.sources[j]): h for (i, j), h in found.items()}
            self.collapsed = None

    def second(self, tangents: Tangents, note: Note, slot: int, into: Tensor | None = None) -> Tensor | None:
        return curvature(self.seconds, tangents, slot, self.shapes[slot], self.out_shape, into)


def linearize(call: Call) -> Linearized:
    region: Region = call.node.target  # type: ignore[assignment]
    known = [*call.values, call.out]
    active = [slot for slot, on in enumerate(call.active) if on]
    if region.meet is None:
        return _Dense(call, active, _collapsed(region, known, active, 0))
    place = region.inputs + region.meet
    front = Region(region.inputs, region.members[: region.meet + 1], None)
    shares = _collapsed(front, known, active, 0).first
    tail = _collapsed(region, known, [place], region.meet + 1) if place < len(known) - 1 else None
    return _Meeting(call, {active[i]: a for i, a in shares.items()}, tail)


REGION = Rule(Kind.POINTWISE, linearize, _pairs)

__all__ = ["REGION", "Region"]
