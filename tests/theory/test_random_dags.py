"""Random DAGs: Jacobians, Theorem 25 and sums over paths, whatever the graph; gates and shared inputs among them."""

from __future__ import annotations

import os

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import UnsatisfiedAssumption

import dag_hesse as dh
from dag_hesse.errors import BatchCouplingError, DagHesseError
from tests.property.dags import BATCH, LOSSES, WIDTH, Dag, Recipe, recipes

EXAMPLES = int(os.environ.get("DAG_HESSE_FUZZ", "400")) // 20


def posed(recipe: Recipe) -> tuple[Dag, dict]:
    torch.manual_seed(recipe.seed)
    model = Dag(recipe).double()
    batch = torch.randn(BATCH, WIDTH).double(), torch.randn(BATCH, WIDTH).double()
    names = [f"nodes.{k}" for k in recipe.reaching()]
    return model, {"batch": batch, "loss": LOSSES[recipe.loss], "points": names}


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(recipe=recipes())
def test_whatever_the_graph(recipe: Recipe) -> None:
    model, given_ = posed(recipe)
    try:
        found = dh.theory.resonance_bounds(model, **given_)
    except (BatchCouplingError, DagHesseError):  # samples interact, or a point is a constant
        raise UnsatisfiedAssumption from None
    assert found.lyapunov.holds.all()
    assert found.global_rate.holds.all()
    report = dh.analyze(model, **given_, mode="exact")
    scale = float(np.nanmax(report.gn_norm, initial=0.0))
    for v in report.names:
        for w in report.names:
            paths = dh.theory.block_paths(model, v=v, w=w, **given_)
            assert paths.defect < 1e-9 or float(paths.block.norm()) < 1e-9 * scale
            off = float((paths.block - report.block(v, w, "gn")).norm())
            assert off <= 1e-9 * max(scale, 1e-300), (v, w, off)


def test_a_gate_has_two_ways() -> None:
    """x·tanh(Wx): x and its gate meet again, so Theorem 25 says nothing of the pair (x, gate), and of (x, y) it does."""

    class Gate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.gate, self.head = (torch.nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.head(dh.tap(x * torch.tanh(self.gate(x)), "product"))

    torch.manual_seed(0)
    batch = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 0])
    found = dh.theory.resonance_bounds(Gate().double(), batch, points=["stem", "gate", "product"])
    assert not found.lyapunov.applies[0, 1].any()
    assert found.lyapunov.applies[0, 2].all() and found.lyapunov.holds.all()
    assert found.jacobians.graph.out_degree == 2
