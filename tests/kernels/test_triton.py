"""Generated kernels without a GPU: what they compute, in Triton's interpreter, and what a compiler makes of them.

Interpreter and compiler want a process each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import compiled

ROOT = Path(__file__).parents[2]
BUDGET: dict[str, dict[str, int]] = json.loads(Path(__file__).with_name("budget.json").read_text())
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux alone")

MODEL = """
import torch, dag_hesse as dh
from dag_hesse.kernels import dispatch, machine, program
machine.CPU.program = 1
torch.manual_seed(0)
net = torch.nn.Sequential(
    torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.GELU(), torch.nn.Linear(7, 6), torch.nn.SiLU(), torch.nn.Unflatten(1, (2, 3)),
    torch.nn.BatchNorm1d(2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(6, 3), torch.nn.Softplus(),
).to(torch.{dtype}).eval()
H = dh.HessianOperator(net, (torch.randn(9, 5).to(torch.{dtype}), torch.arange(9) % 3))
found = H @ torch.linspace(-1, 1, H.shape[1]).to(torch.{dtype})
print(*found.tolist(), sep=",")
refused = [why for why in program.run.refusals.get("triton", ()) if not why.endswith("meta")]  # planned on shapes
print(refused, dispatch.failures())
"""


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_agree_with_their_reference() -> None:
    conformance = "tests/kernels/test_conformance.py"
    run(
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        conformance,
        "-k",
        "always or half or finite",
        TRITON_INTERPRET="1",
    )


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
def test_products_of_a_model_are_the_same(dtype: str, tolerance: float) -> None:
    found = [
        [float(x) for x in text.split(",")]
        for text, by in (
            run("-c", MODEL.format(dtype=dtype), **extra).split("\n")[:2]
            for extra in ({"TRITON_INTERPRET": "1"}, {"DAG_HESSE_KERNELS": "program=reference"})
        )
        if by == "[] []"
    ]
    assert len(found) == 2, "a program was refused or failed"
    largest = max(map(abs, found[1]))
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) < tolerance * largest


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(run("-m", "tests.kernels.compiled"))
    return found


def test_what_is_compiled_is_what_has_a_budget() -> None:
    assert set(compiled.NAMES) == set(BUDGET)


@pytest.mark.xdist_group("compiled")  # so that one process compiles, once
@pytest.mark.parametrize("name", list(BUDGET))
def test_compiled_code_stays_within_its_budget(name: str, usage: dict[str, dict[str, Any]]) -> None:
    found, most = usage[name], BUDGET[name]
    assert found["registers"] <= most["registers"], name
    assert found["stack"] == found["spills"] == 0, name
    assert found["loads"] > 0
    assert found["loads"] - found["wide loads"] <= most.get("narrow", 0), f"{name}: not all loads are of 128 bits"
