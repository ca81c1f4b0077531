"""Which implementation of a kernel runs, and what is said of those that refuse."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

import dag_hesse as dh
from dag_hesse.kernels.arena import SYSTEM, Arena
from dag_hesse.kernels.batch_affine import sums
from dag_hesse.kernels.dispatch import KERNELS, Implementation, Kernel, failures

PRODUCT = """
import torch, dag_hesse as dh
from dag_hesse.kernels import contraction
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
H = dh.HessianOperator(net, (torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])))
print(*(H @ torch.ones(26).double()).tolist(), sep=",")
print(*(one._chosen == one.implementations for one in (contraction.product, contraction.outer)))
"""


def run(forced: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DAG_HESSE_KERNELS": forced}
    return subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, env=environment)


def test_the_environment_forces_an_implementation() -> None:
    (free, chosen), (forced, bare) = (
        run(text).stdout.split("\n")[:2] for text in ("", "contraction.product=reference")
    )
    assert (chosen, bare) == ("True True", "False True")
    a, b = (torch.tensor([float(x) for x in text.split(",")]) for text in (free, forced))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "forced, message",
    [
        ("contraction.product=fast", "no implementation 'fast'; it has reference, "),
        ("contractions=torch", "no kernel 'contractions'"),
        ("contraction.product", "expected kernel=implementation"),
    ],
)
def test_what_cannot_be_forced_is_named(forced: str, message: str) -> None:
    done = run(forced)
    assert done.returncode != 0
    assert "OptionError" in done.stderr and message in done.stderr


def test_refusals_are_counted_and_shown() -> None:
    g = torch.randn(1, 1, 3, 5, 7).double().movedim(2, -1).contiguous().movedim(-1, 2)
    before = sum(sums.refusals.get("torch", {}).values())
    sums(SYSTEM, g, g, torch.zeros(3).double(), torch.ones(3).double(), torch.ones(3).double(), 0.0)
    assert sum(sums.refusals["torch"].values()) == before + 1
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    assert "as if it were contiguous" in str(dh.profile(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))))


def test_a_tensor_that_lies_as_it_is_wanted_is_no_refusal() -> None:
    x, last = torch.randn(2, 3, 4, 5), torch.channels_last
    for given, layout in ((x, torch.contiguous_format), (x.contiguous(memory_format=last), last)):
        before = copy.deepcopy(KERNELS["layout"].refusals)
        assert KERNELS["layout"](SYSTEM, given, layout) is given
        assert KERNELS["layout"].refusals == before


def test_what_fails_to_compile_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(arena: Arena, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such\n  instruction")

    kernel = Kernel("doubled", lambda arena, x: x + x, (Implementation("fast", broken, compiled=True),))
    try:
        for _ in range(2):
            assert kernel(SYSTEM, torch.ones(2)).tolist() == [2.0, 2.0]
        assert "no such instruction" in str(kernel.refusal(torch.ones(2)))
        assert [text for text in failures() if "doubled, fast" in text]
        assert capsys.readouterr().err.count("kernel doubled: fast is left out") == 1
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        assert "left out: kernel doubled, fast" in str(
            dh.analyze(net, (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])))
        )
    finally:
        del KERNELS["doubled"]
