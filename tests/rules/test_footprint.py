"""Footprints, found on shapes, against the storages that real calls hold once they are bound and pushed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dag_hesse.ir import Kind, Node
from dag_hesse.rules import RULES, Call
from dag_hesse.rules.footprint import OWN, footprint, tensors
from dag_hesse.rules.table import pairs_of
from tests import device
from tests.rules.samples import Sample
from tests.rules.test_rules import ROWS, make_call


def place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def held(tree: Any) -> dict[int, int]:
    return {place(x): x.untyped_storage().nbytes() for x in tensors(tree)}


def split(found: dict[int, int], named: dict[int, int]) -> tuple[set[int], int]:
    """Which of ``named`` are held, and bytes of the others."""
    return {named[k] for k in found if k in named}, sum(size for k, size in found.items() if k not in named)


def leaf(x: Tensor) -> Node:
    return Node(0, "leaf", None, (), {}, (), tuple(x.shape), x.dtype, Kind.PARAM)


def by_values(call: Call) -> bool:
    """Whether the call cannot be run on shapes: a mask's places are as many as its values say."""
    return any(x.dtype is torch.bool for x in call.values) and "index" in call.node.op


@pytest.mark.parametrize("name, sample", ROWS)
def test_what_a_rule_keeps(name: str, sample: Sample) -> None:
    torch.manual_seed(0)
    call = make_call(name, sample)
    curved = bool(pairs_of(call.node))
    predicted = footprint(call.node, [leaf(x) for x in call.values], call.active, curved)
    if by_values(call):  # then all that it could keep is predicted
        assert predicted.values.slots == {slot for slot, on in enumerate(call.active) if on} | {OWN}
        return
    lin = RULES[name].linearize(call)
    slots = [slot for slot, on in enumerate(call.active) if on]
    named = {place(x): slot for slot, x in enumerate(call.values)} | {place(call.value): OWN}
    assert split(held(lin), named) == (set(predicted.values.slots), predicted.values.bytes)
    lam = torch.randn_like(call.value).unsqueeze(0)
    pulled = lin.bind(lam, slots, {})
    theirs = {place(x): slot for slot, x in pulled.items()} | {place(lam): OWN}
    after = held(lin)
    assert split(after, theirs)[0] == set(predicted.adjoints)
    own = {k: size for k, size in after.items() if k not in theirs or k in named}
    assert split(own, named) == (set(predicted.bound.slots), predicted.bound.bytes)
    tangents = {slot: torch.randn(1, *call.shape(slot), dtype=torch.float64, device=device.NAME) for slot in slots}
    moved, residual = lin.push(tangents, True, slots)
    assert moved is not None
    given = {place(x): slot for slot, x in tangents.items()}
    given.setdefault(place(moved), OWN)
    assert split(held(residual), given) == (set(predicted.residual.slots), predicted.residual.bytes)
