"""Predicted memory: what rules keep of a tangent pass, and the peak of a sweep."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import dag_hesse as dh
from bench.timing import peak_bytes
from dag_hesse.capture import Batches
from dag_hesse.plan import fuse
from dag_hesse.plan.memory import Held, held, sweep_bytes
from dag_hesse.sweep import Problem
from tests.models.zoo import CASES, case


@pytest.mark.parametrize("name", sorted(CASES))
def test_rules_keep_what_the_plan_says(name: str) -> None:
    one = case(name)
    points = [*one.names, *one.parameters]
    graph = fuse(dh.capture(one.model, one.batch, loss=one.loss, output=one.out or None, points=points))
    _, lin = next(iter(Problem(one.model, [graph], Batches(one.batch), "shared", with_out=False).linearizations()))
    for index in lin.calls:
        node, foreseen = graph.nodes[index], held(graph, graph.nodes[index], lin.active)
        if index not in lin.curved:
            assert foreseen == Held()
            continue
        slots = sorted(lin.curved[index])
        tangents = {slot: torch.randn(1, *graph.nodes[node.inputs[slot]].shape, dtype=node.dtype) for slot in slots}
        moved, saved = lin.calls[index].push(tangents, True, slots)
        places = {x.untyped_storage().data_ptr(): node.inputs[slot] for slot, x in tangents.items()}
        places[moved.untyped_storage().data_ptr()] = index
        kept = {x.untyped_storage().data_ptr(): x for x in tensors(saved)}
        assert {places[place] for place in kept if place in places} == foreseen.tangents, node
        assert sum(x.nbytes for place, x in kept.items() if place not in places) == foreseen.own, node


def tensors(residual: Any) -> list[Tensor]:
    """All tensors in a residual, whatever its form."""
    if is_dataclass(residual):
        residual = [getattr(residual, field.name) for field in fields(residual)]
    return [x for x in tree_leaves(residual) if isinstance(x, Tensor)]


SETUP = """
import torch, dag_hesse as dh
from dag_hesse.kernels.pool import Pool
from torch import nn
layers = [layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.SiLU())]
model = nn.Sequential(*layers, nn.Linear(512, 10))
batch = (torch.randn(2048, 512), torch.arange(2048) % 10)
H = dh.HessianOperator(model, batch, loss=nn.functional.cross_entropy, space={space!r})
v = torch.randn(H.shape[0])
H @ v  # linearizes
H._problem.pool = Pool()
"""


@pytest.mark.parametrize("space", ["activation", "parameter"])
def test_the_peak_of_a_sweep_is_foreseen(space: str) -> None:
    code, found = SETUP.format(space=space), dict[str, Any]()
    exec(code, found)
    graph = fuse(dh.capture(found["model"], found["batch"], loss=nn.functional.cross_entropy, space=space))
    sites = [k for point in graph.points for k in point.sites]
    assert abs(sweep_bytes(graph, sites, sites) / peak_bytes(f"{code}run = lambda: H @ v") - 1) < 0.15
