"""The benchmarks of a GPU run end to end, in a tiny form, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import gpu, kernels, ranks, scaling
from bench.predict_ranks import Costs, Link, Work, lines, predicted, ring
from bench.workloads import Workload
from tests import device


def tiny() -> Workload:
    torch.manual_seed(0)
    return Workload(nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3)), torch.randn(6, 4), torch.arange(6) % 3)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORKLOADS", "LARGE"):
        monkeypatch.setattr(gpu, name, {"MLP, tiny": tiny})
    monkeypatch.setattr(kernels, "COUNT", {"cpu": 1 << 17, "cuda": 1 << 17})
    for where in (kernels, gpu):
        monkeypatch.setattr(where, "ROUNDS", 2)


def test_the_benchmark_of_a_gpu_runs(small: None, tmp_path: Path) -> None:
    card = gpu._card()
    assert gpu.main(folder=tmp_path) == 0
    found = json.loads((tmp_path / f"gpu/{card}.json").read_text())
    assert {row["dtype"] for row in found["correctness"]} == {"float64", "float32"}
    for row in found["correctness"]:
        assert not row["unable"] and max(row["errors"].values()) < {"float64": 1e-12, "float32": 1e-4}[row["dtype"]]
    (row,) = found["products"]
    assert {"gradient", "ours, amortized", "functorch jvp∘grad", "double-backward, retained graph"} <= set(
        row["gradients"]
    )
    name = f"gpu/{card}-kernels" if device.NAME != "cpu" else "kernels"
    rows = json.loads((tmp_path / f"{name}.json").read_text())
    assert rows["kernels"] and not any("error" in one for one in rows["kernels"]) and rows["best"]["copy GB/s"] > 0


def test_predictions_for_many_ranks_have_the_right_limits() -> None:
    slow, fast = Link(1e-4, 1e9), Link(0.0, float("inf"))
    costs, work = Costs(1e-3, 0.0, 2e-3, 10**6, 4), Work(1024, 64, 2)
    for axis in ("data", "probe"):
        assert predicted(costs, slow, work, 1, axis).send == 0 and predicted(costs, slow, work, 1, axis).speed == 1
        for count in (2, 8, 32):  # as many pieces as ranks, or more
            assert predicted(costs, fast, work, count, axis).speed == pytest.approx(count)
            assert predicted(costs, slow, work, count, axis).speed < count
    assert predicted(costs, fast, work, 1024, "probe").speed == pytest.approx(work.pieces)  # the rest have none
    fixed = Costs(1e-3, 0.1, 0.0, 10**6)  # what a shard does not divide
    assert predicted(fixed, fast, work, 10**9, "data").speed == pytest.approx(1 + 1.024 / 0.1)
    assert ring(1e9, 10**6, Link(0.0, 1e9)) == pytest.approx(2, rel=1e-5) and ring(1e9, 2, Link(0.0, 1e9)) == 1
    assert ring(0.0, 3, slow) == pytest.approx(4e-4)
    assert predicted(costs, slow, work, 8, "data").linearize == predicted(costs, slow, work, 8, "probe").linearize / 8
    assert all(line.count("|") == 9 for line in lines())


def test_the_benchmark_of_ranks_runs() -> None:
    found = ranks.measured(scaling._chain, ranks.Size(1, (8, 1), (4, 3), 1))
    assert scaling._ranks_table(found).row_count == 2
    assert all(row["efficiency"] > 0 and row["predicted"] > 0 for row in (found["data"], found["probe"]))
