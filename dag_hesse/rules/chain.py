"""The chain rule through elementwise ops in a row: partials of the last one by some variables.

Recorded as a program and run in one pass where that can be done (:mod:`dag_hesse.kernels.program`), else op by op.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, final

from torch import Tensor

from dag_hesse.ir.node import Kind, Node, execute
from dag_hesse.kernels import program
from dag_hesse.kernels.arena import SYSTEM, Arena
from dag_hesse.kernels.elementwise import Coefficient, plus_product, product
from dag_hesse.rules.base import Call, Rule

_LOG = logging.getLogger("dag_hesse")

Members = Sequence[tuple[int, Node]]  # each with its place among a region's values
Known = Mapping[int, Tensor]  # values by place
# A member, its place, its first and its second partials.
_Step = tuple[Node, int, dict[int, Coefficient], dict[tuple[int, int], Coefficient]]


@dataclass(frozen=True, slots=True)
class Descent:
    """What λ of the last member makes of all: c_i, h_ij (what is not there is zero), and c_i λ where it is wanted."""

    first: dict[int, Coefficient]
    second: dict[tuple[int, int], Coefficient]
    pulled: dict[int, Tensor]


class Fused(ABC):
    """Members as one function of their variables, by which the partials are numbered."""

    @property
    @abstractmethod
    def first(self) -> dict[int, Coefficient]:
        """c_i = ∂φ/∂x_i."""

    @abstractmethod
    def descend(self, lam: Tensor, wanted: Sequence[int]) -> Descent:
        """First partials, and second ones weighted with λ; c_i λ of the variables that are ``wanted``."""


def rule_of(node: Node) -> Rule:
    """The rule of a member."""
    from dag_hesse.rules.table import RULES  # the table has the row of regions in it

    return RULES[node.op]


def is_active(member: Node) -> bool:
    """Whether derivatives pass a member."""
    return member.kind is not Kind.CONST


def fuse_members(members: Members, known: Known, variables: Sequence[int], arena: Arena = SYSTEM) -> Fused:
    """The last of ``members`` as a function of the values at ``variables``."""
    if any(rule_of(node).pairs(node) for _, node in _reached(members, variables)):
        recorded = _Recorded.of(members, known, variables, arena)
        if recorded is not None:
            return recorded
    return _by_op(members, known, variables, arena)


def _by_op(members: Members, known: Known, variables: Sequence[int], arena: Arena) -> _ByOp:
    if len(variables) == 1:
        return _OfOne(members, known, variables[0], arena)
    return _OfSeveral(members, known, variables, arena)


def _reached(members: Members, variables: Iterable[int]) -> Iterator[tuple[int, Node]]:
    """Members that the variables reach."""
    reached = set(variables)
    for place, node in members:
        if is_active(node) and not reached.isdisjoint(node.inputs):
            reached.add(place)
            yield place, node


def _steps(members: Members, known: Known, variables: Sequence[int], arena: Arena) -> Iterator[_Step]:
    reached = set(variables)
    for place, node in _reached(members, variables):
        on = tuple(k in reached for k in node.inputs)
        partials = rule_of(node).partials
        assert partials is not None
        reached.add(place)
        yield node, place, *partials(Call(node, tuple(known[k] for k in node.inputs), known[place], on, arena=arena))


class _ByOp(Fused):
    arena: Arena

    @abstractmethod
    def second_partials(self, lam: Tensor) -> dict[tuple[int, int], Coefficient]:
        """h_ij."""

    def descend(self, lam: Tensor, wanted: Sequence[int]) -> Descent:
        pulled = {i: product(self.arena, self.first[i], lam) for i in wanted}
        return Descent(self.first, self.second_partials(lam), pulled)  # type: ignore[arg-type]  # λ is a tensor


@final
class _OfOne(_ByOp):
    """φ(z): φ' and φ'' by the chain rule, member by member; then h = λ φ''."""

    def __init__(self, members: Members, known: Known, variable: int, arena: Arena) -> None:
        self.arena = arena
        d1: dict[int, Coefficient] = {variable: 1.0}
        d2: dict[int, Coefficient] = {}
        place = variable
        for member, place, first, second in _steps(members, known, [variable], arena):
            reached = [(slot, k) for slot, k in enumerate(member.inputs) if k in d1]
            d1[place] = _sum_of_products(arena, ((first[slot], d1[k]) for slot, k in reached))
            terms = [(first[slot], d2[k]) for slot, k in reached if k in d2]
            for (p, q), h in second.items():
                i, j = member.inputs[p], member.inputs[q]
                if i in d1 and j in d1 and p <= q:
                    terms.append((product(arena, product(arena, 2.0 if p < q else 1.0, h), d1[i]), d1[j]))
            if terms:
                d2[place] = _sum_of_products(arena, terms)
        self._first, self.second = {0: d1[place]}, d2.get(place)

    @property
    def first(self) -> dict[int, Coefficient]:
        return self._first

    def second_partials(self, lam: Tensor) -> dict[tuple[int, int], Coefficient]:
        return {} if self.second is None else {(0, 0): product(self.arena, self.second, lam)}


def _sum_of_products(arena: Arena, terms: Iterable[tuple[Coefficient, Coefficient]]) -> Coefficient:
    total: Coefficient | None = None
    for a, b in terms:
        total = product(arena, a, b) if total is None else plus_product(arena, total, a, b)
    assert total is not None
    return total


@final
class _OfSeveral(_ByOp):
    """φ(x_1 … x_k): D_u of every member u, then Σ_u λ_u φ_u'' D_u D_uᵀ."""

    def __init__(self, members: Members, known: Known, variables: Sequence[int], arena: Arena) -> None:
        self.arena = arena
        self.own: dict[int, dict[int, Coefficient]] = {k: {i: 1.0} for i, k in enumerate(variables)}
        self.steps = list(_steps(members, known, variables, arena))
        for member, place, first, _ in self.steps:
            total: dict[int, Coefficient] = {}
            for slot, k in enumerate(member.inputs):
                for i, c in self.own.get(k, {}).items():
                    total[i] = (
                        plus_product(arena, total[i], first[slot], c) if i in total else product(arena, first[slot], c)
                    )
            self.own[place] = total
        self.last = members[-1][0]

    @property
    def first(self) -> dict[int, Coefficient]:
        return self.own[self.last]

    def second_partials(self, lam: Tensor) -> dict[tuple[int, int], Coefficient]:
        adjoints: dict[int, Coefficient] = {self.last: lam}
        inner = {place for _, place, _, _ in self.steps}
        found: dict[tuple[int, int], Coefficient] = {}
        for member, place, first, second in reversed(self.steps):
            mine = adjoints.pop(place, None)
            if mine is None:
                continue
            for (p, q), h in second.items():
                left, right = self.own.get(member.inputs[p], {}), self.own.get(member.inputs[q], {})
                weighted = product(self.arena, h, mine)
                for (i, a), (j, b) in ((x, y) for x in left.items() for y in right.items()):
                    if i <= j:
                        term = product(self.arena, weighted, a)
                        found[i, j] = (
                            plus_product(self.arena, found[i, j], term, b)
                            if (i, j) in found
                            else product(self.arena, term, b)
                        )
            for slot, k in enumerate(member.inputs):
                if k in inner:
                    adjoints[k] = (
                        plus_product(self.arena, adjoints[k], first[slot], mine)
                        if k in adjoints
                        else product(self.arena, first[slot], mine)
                    )
        return found | {(j, i): h for (i, j), h in found.items()}


# Programs by what they were made of, the oldest first; None where the code was refused.
_MOST = 1 << 12
_PROGRAMS: dict[Hashable, program.NamedProgram | None] = {}


@final
class _Recorded(Fused):
    """Programs that make all partials in one pass over the values of the variables, whenever they are asked for."""

    def __init__(self, members: Members, operands: Known, variables: Sequence[int], like: Tensor, arena: Arena) -> None:
        self.arena = arena
        self.members, self.operands, self.variables, self.like = members, operands, variables, like

    @classmethod
    def of(cls, members: Members, known: Known, variables: Sequence[int], arena: Arena) -> _Recorded | None:
        """None where there is no program for these members and values."""
        reached = dict(_reached(members, variables))
        places = dict.fromkeys(k for node in reached.values() for k in node.inputs if k not in reached)
        operands, value = {k: known[k] for k in places}, known[members[-1][0]]
        like = next((x for x in operands.values() if x.shape == value.shape), None)
        if like is None or program.run.refusal(None, list(operands.values()), like):
            return None
        made = cls(list(reached.items()), operands, variables, like, arena)
        return None if made._program() is None or made._program(like) is None else made

    def _code(self, wanted: Sequence[int], *tensors: Tensor) -> dict[Hashable, Any]:
        """What is recorded: the partials op by op, and, if λ is given behind the operands, what descends from it."""
        known = dict(zip(self.operands, tensors, strict=False))
        for place, node in self.members:
            known[place] = execute(node, [known[k] for k in node.inputs])
        found = _by_op(self.members, known, self.variables, SYSTEM)
        named: dict[Hashable, Any] = {("first", i): c for i, c in found.first.items()}
        if len(tensors) == len(self.operands):
            return named
        descent = found.descend(tensors[-1], wanted)
        named |= {("second", *pair): h for pair, h in descent.second.items()}
        return named | {("pulled", i): x for i, x in descent.pulled.items()}

    def _program(self, lam: Tensor | None = None, wanted: Sequence[int] = ()) -> program.NamedProgram | None:
        given = [*self.operands.values(), *([] if lam is None else [lam])]
        code = [(k, node.op, repr(node.args), repr(node.kwargs), node.inputs) for k, node in self.members]
        kinds = [(x.dtype, tuple(size == 1 for size in x.shape)) for x in given]
        key = tuple(tuple(part) for part in (code, self.operands, self.variables, kinds, wanted))
        if key not in _PROGRAMS:
            if len(_PROGRAMS) >= _MOST:
                del _PROGRAMS[next(iter(_PROGRAMS))]
            try:
                named = program.record(partial(self._code, wanted), given, self.like)
            except program.Refused as refused:
                _LOG.info("no program for %s: %s", " ".join(node.op for _, node in self.members), refused)
                _PROGRAMS[key] = None
            else:  # partials that are operands or numbers cost nothing as they are
                new = any(k[0] != "pulled" and r.computed is not None for k, r in named.results.items())  # type: ignore[index]
                _PROGRAMS[key] = named if new or lam is None else None
        return _PROGRAMS[key]

    def _run(self, lam: Tensor | None = None, wanted: Sequence[int] = ()) -> dict[str, dict[Any, Coefficient]]:
        named = self._program(lam, wanted)
        assert named is not None
        given = [*self.operands.values(), *([] if lam is None else [lam])]
        made = program.run(self.arena, named.program, given, self.like) if named.program.results else []
        found: dict[str, dict[Any, Coefficient]] = {"first": {}, "second": {}, "pulled": {}}
        for key, result in named.results.items():
            what, *numbers = cast(tuple[Any, ...], key)
            value: Any = result.number
            if result.computed is not None:
                value = made[result.computed]
            elif result.operand is not None:
                value = given[result.operand]
            found[what][numbers[0] if len(numbers) == 1 else tuple(numbers)] = value
        return found

    @property
    def first(self) -> dict[int, Coefficient]:
        return self._run()["first"]

    def descend(self, lam: Tensor, wanted: Sequence[int]) -> Descent:
        found = self._run(lam, wanted)
        return Descent(found["first"], found["second"], found["pulled"])  # type: ignore[arg-type]  # λ is a tensor


__all__ = ["Descent", "Fused", "fuse_members", "is_active", "rule_of"]
