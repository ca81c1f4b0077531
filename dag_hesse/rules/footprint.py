"""What a call keeps, found by running its rule on shapes: nothing about memory is stated twice.

The rule is linearized, bound and pushed once on tensors without memory (PyTorch's ``meta`` device), in the layouts that
sweeps have; the storages that are held afterwards tell what it keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dag_hesse.errors import NonDifferentiableError
from dag_hesse.ir.node import Kind, Node
from dag_hesse.rules.base import Call, Linearized
from dag_hesse.rules.region import Region
from dag_hesse.rules.table import evaluate, rule_for

OWN = -1  # stands for a call's own value, λ or tangent, as its slots do for its inputs'
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, slots=True)
class Held:
    """Tensors of a call's inputs or output (slots, or ``OWN``), and bytes of others."""

    slots: frozenset[int] = frozenset()
    bytes: int = 0


NOTHING = Held()


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a call keeps.

    Attributes:
        values: after it is linearized, of its inputs' values and its own.
        bound: the same once λ is bound.
        adjoints: then also of λ (``OWN``) and of its inputs' adjoints that come of it.
        residual: what one row of a tangent pass saves: of tangents, and bytes.
        passed: slots whose adjoint is λ itself, or a view of it.
    """

    values: Held
    bound: Held
    adjoints: frozenset[int]
    residual: Held
    passed: frozenset[int] = frozenset()


EMPTY = Footprint(NOTHING, NOTHING, frozenset(), NOTHING)


class _Key:
    """A call as shapes: equal where footprints are."""

    def __init__(self, node: Node, inputs: Sequence[Node], active: Sequence[bool], curved: bool) -> None:
        self.node, self.active, self.curved = node, tuple(active), curved
        self.inputs = tuple((k.shape, k.dtype, k.target is None) for k in inputs)
        self._code = (*_code(node), self.inputs, self.active, curved)

    def __hash__(self) -> int:
        return hash(self._code)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._code == other._code


def _code(node: Node) -> tuple[Any, ...]:
    members = node.target.members if isinstance(node.target, Region) else ()
    own = (node.op, repr(node.args), repr(node.kwargs), node.inputs if members else (), node.shape, node.dtype)
    return (*own, node.kind, node.output, *((*_code(m), m.inputs) for m in members))


def footprint(node: Node, inputs: Sequence[Node], active: Sequence[bool], curved: bool) -> Footprint:
    """What a call of ``node`` keeps, one probe a row.

    Args:
        node, inputs: the node, and its inputs.
        active: per slot, whether a point reaches that input.
        curved: whether its second-order term is asked for.
    """
    return _footprint(_Key(node, inputs, active, curved)) if any(active) else EMPTY


class _Shapes(TorchDispatchMode):
    """Tensors that an op makes for itself have no memory either."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{key: "meta" if key == "device" else value for key, value in (kwargs or {}).items()})


@lru_cache(maxsize=1 << 12)
def _footprint(key: _Key) -> Footprint:
    with torch.no_grad(), _Shapes():
        try:
            return _by_running(key)
        except (RuntimeError, NonDifferentiableError):  # it goes by values, or has no shapes
            return _at_most(key)


def _at_most(key: _Key) -> Footprint:
    """All that a rule could keep: of a differentiated op that cannot be run on shapes."""
    slots = frozenset(slot for slot, on in enumerate(key.active) if on)
    every = Held(slots | {OWN})
    return Footprint(every, every, frozenset({OWN}), Held(slots) if key.curved else NOTHING)


def _blank(shape: Sequence[int], dtype: torch.dtype, leaf: bool) -> Tensor:
    x = torch.empty(tuple(shape), dtype=dtype, device="meta")
    return x if leaf or x.ndim not in _LAST else x.contiguous(memory_format=_LAST[x.ndim])


def _by_running(key: _Key) -> Footprint:
    if key.node.kind is Kind.OPAQUE:
        return _at_most(key)
    inputs = tuple(_blank(*one) for one in key.inputs)
    known, value = evaluate(key.node, inputs)
    lin = rule_for(key.node).linearize(Call(key.node, known, value, key.active, key.curved))
    names = {_place(x): slot for slot, x in enumerate(inputs)} | {_place(value): OWN}
    values = _held(lin, names)
    slots = [slot for slot, on in enumerate(key.active) if on]
    lam = torch.empty_like(value).unsqueeze(0)
    pulled = lin.bind(lam, slots, {})
    theirs = {_place(x): slot for slot, x in pulled.items()} | {_place(lam): OWN}
    bound, adjoints = _held(lin, names | dict.fromkeys(theirs, None)), _held(lin, theirs).slots
    tangents = {slot: torch.empty_like(inputs[slot]).unsqueeze(0) for slot in slots}
    moved, residual = lin.push(tangents, True, slots)
    given = {_place(x): slot for slot, x in tangents.items()}
    if moved is not None:
        given.setdefault(_place(moved), OWN)
    passed = frozenset(slot for slot, x in pulled.items() if _place(x) == _place(lam))
    return Footprint(values, bound, adjoints, _held(residual, given), passed)


def _place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _held(tree: Any, names: Mapping[int, int | None]) -> Held:
    """What of ``names`` (slots by storage; None: not counted) a tree holds, and the bytes of all else."""
    found = {_place(x): x for x in tensors(tree)}
    slots = frozenset(slot for place in found if (slot := names.get(place)) is not None)
    return Held(slots, sum(x.untyped_storage().nbytes() for place, x in found.items() if place not in names))


def tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors in a bound call or a residual, whatever its form."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)
    elif is_dataclass(tree) and not isinstance(tree, (type, Node)):
        yield from tensors([getattr(tree, field.name) for field in fields(tree)])
    elif isinstance(tree, Linearized) or hasattr(tree, "operands"):
        yield from tensors(vars(tree))


__all__ = ["EMPTY", "NOTHING", "OWN", "Footprint", "Held", "footprint", "tensors"]
