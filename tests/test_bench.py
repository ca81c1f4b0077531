"""The benchmarks of a GPU run end to end, in a tiny form, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import gpu, kernels
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
