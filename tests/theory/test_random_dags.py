"""Random DAGs: Jacobians, Theorem 25 and sums over paths, whatever the graph; gates and shared inputs among them."""

from __future__ import annotations

import os

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import UnsatisfiedAssumption

import dag_hesse as dh
from dag_hesse.errors import BatchCouplingError, PointError
from dag_hesse.theory.edge_maps import edge_maps
from dag_hesse.theory.path_search import all_paths
from dag_hesse.theory.scene import pose
from tests.property.dags import BATCH, LOSSES, WIDTH, Dag, Recipe, recipes

EXAMPLES = int(os.environ.get("DAG_HESSE_FUZZ", "400")) // 40


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
    except (BatchCouplingError, PointError):  # samples interact, or a point has no batch axis or is another
        raise UnsatisfiedAssumption from None
    assert found.lyapunov.holds.all()
    assert found.global_rate.holds.all()
    report = dh.analyze(model, **given_, mode="exact")
    scale = float(np.nanmax(report.gn_norm, initial=1e-300))
    scene = pose(model, **given_)
    maps, out = edge_maps(scene), len(scene.points) - 1
    along = [sum(map(maps.along, all_paths(maps.graph, v, out))) for v in range(len(scene.points))]
    for v, name in enumerate(report.names):
        total = maps.total(v)[out]
        assert float((along[v] - total).norm()) <= 1e-12 * float(total.norm())
        for w in range(v + 1):
            block = maps.block(along[v], along[w])
            assert float((block - report.block(name, report.names[w], "gn")).norm()) <= 1e-9 * scale


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
