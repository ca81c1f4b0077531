"""Predicted memory: what a linearization keeps, and the peak of a sweep."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import dag_hesse as dh
from bench.timing import peak_bytes
from dag_hesse._capture import Batches
from dag_hesse.plan import fuse
from dag_hesse.plan.memory import kept_bytes, sweep_bytes
from dag_hesse.rules.footprint import tensors
from dag_hesse.sweep import Problem
from tests.models.zoo import CASES, case


def place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@pytest.mark.parametrize("name", sorted(CASES))
def test_linearizations_keep_what_is_predicted(name: str) -> None:
    one = case(name)
    points = [*one.names, *one.parameters]
    graph = fuse(dh.capture(one.model, one.batch, loss=one.loss, output=one.out or None, points=points))
    batches = Batches(one.batch)
    _, lin = next(iter(Problem(one.model, [graph], batches, "shared", with_out=False).linearizations()))
    given = [*one.model.parameters(), *one.model.buffers(), *batches.tensors, *graph.constants.values()]
    theirs = {place(x) for x in given}
    kept = {place(x): x.untyped_storage().nbytes() for x in tensors(list(lin.calls.values()))}
    found = sum(size for k, size in kept.items() if k not in theirs)
    predicted = kept_bytes(graph, [k for point in graph.points for k in point.sites])
    assert 0.98 * found <= predicted <= 1.2 * found  # a reshape that copies is taken for a view of a larger whole


SETUP = """
import torch, dag_hesse as dh
from torch import nn
layers = [layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.SiLU())]
model = nn.Sequential(*layers, nn.Linear(512, 10))
batch = (torch.randn(2048, 512), torch.arange(2048) % 10)
H = dh.HessianOperator(model, batch, loss=nn.functional.cross_entropy, space={space!r})
v = torch.randn(H.shape[0])
H @ v  # linearizes
H._problem.arena.retire()
"""


@pytest.mark.parametrize("space", ["activation", "parameter"])
def test_the_peak_of_a_sweep_is_predicted(space: str) -> None:
    code, found = SETUP.format(space=space), dict[str, Any]()
    exec(code, found)
    graph = fuse(dh.capture(found["model"], found["batch"], loss=nn.functional.cross_entropy, space=space))
    sites = [k for point in graph.points for k in point.sites]
    assert abs(sweep_bytes(graph, sites, sites) / peak_bytes(f"{code}run = lambda: H @ v") - 1) < 0.15
