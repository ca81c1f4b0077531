"""Random DAGs against the dense oracle: blocks, their parts, and every claim of the structure stage."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

import dag_hesse as dh
from tests import device
from tests.oracle import Truth, error
from tests.property.dags import BATCH, LOSSES, WIDTH, Dag, Recipe, recipes

SHARDS = 4
EXAMPLES = int(os.environ.get("DAG_HESSE_FUZZ", "200"))  # over all shards


def check(recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    model = Dag(recipe).double().to(device.NAME)
    inputs, targets = (torch.randn(BATCH, WIDTH).double().to(device.NAME) for _ in range(2))
    batch = (inputs, targets)
    loss = LOSSES[recipe.loss]
    names = [f"nodes.{k}" for k in recipe.alive()]
    parameters = ["pool.0.weight"] if 0 in recipe.alive() else []
    graph = dh.capture(model, batch, loss=loss, points=[*names, *parameters])
    truth = Truth(model, lambda: loss(model(batch[0]), batch[1]), names, parameters)
    found = dh.structure(graph)
    report = dh.analyze(model, batch, loss=loss, points=[*names, *parameters], mode="exact")
    for i, v in enumerate(report.names):
        for j, w in enumerate(report.names):
            scale = float((truth.full[v, v].norm() * truth.full[w, w].norm()).sqrt())
            scale = max(scale, float(truth.gn[v, w].norm()), 1e-2)  # weights and data are of order one
            for part in ("full", "gn", "tensor"):
                expected = truth.block(v, w, part, "shared")
                assert error(report.block(v, w, part), expected, scale) < 1e-10, (v, w, part)
            if not found.gn_alive[i, j]:
                assert float(truth.gn[v, w].norm()) <= 1e-12 * scale, (v, w)
            if not found.tensor_alive[i, j]:
                assert float((truth.full[v, w] - truth.gn[v, w]).norm()) <= 1e-12 * scale, (v, w)
            rank = torch.linalg.matrix_rank(truth.block(v, w, "gn", "shared"), atol=1e-9 * scale, rtol=1e-9)
            assert int(rank) <= found.shared_rank_bound[i, j], (v, w)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_dags(shard: int) -> None:
    @(seed(shard) if "DAG_HESSE_FUZZ" not in os.environ else lambda test: test)
    @settings(
        max_examples=-(-EXAMPLES // SHARDS),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(recipes())
    def run(recipe: Recipe) -> None:
        check(recipe)

    run()
