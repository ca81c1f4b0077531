"""Predicted memory: what rules keep of a tangent pass, and the peak of a sweep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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
        node, own = graph.nodes[index], held(graph, graph.nodes[index], lin.active)
        if index not in lin.curved:
            assert own == Held()
            continue
        call = lin.calls[index]
        slots = sorted(lin.curved[index])
        assert {node.inputs[slot] for slot in slots if call.reads(slot)} == own.tangents - {index}, node
        tangents = {slot: torch.randn(1, *graph.nodes[node.inputs[slot]].shape, dtype=node.dtype) for slot in slots}
        assert (call.note(tangents, slots) is not None) == (own.note > 0 or index in own.tangents), node


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
