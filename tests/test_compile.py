"""``compile=True``: the programs that are emitted, on every model of the zoo, and what TorchInductor makes of some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.errors import CompileError, LossError, OptionError
from dag_hesse.sweep import compiled
from tests import device
from tests.models.test_blocks import by_name
from tests.models.zoo import Case, case


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Programs run node by node, by PyTorch; the list has those that would have been compiled."""
    seen: list[torch.fx.GraphModule] = []

    def plain(part: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        seen.append(part)
        return part

    monkeypatch.setattr(compiled, "_compiled", plain)
    yield seen


def pair(c: Case, **options: Any) -> tuple[dh.HessianOperator, dh.HessianOperator]:
    """Without a compiler and with one."""
    found = []
    for compile in (False, True):
        torch.manual_seed(99)  # dropout masks
        found.append(dh.HessianOperator(c.model, c.batch, loss=c.loss, compile=compile, **options))
    return found[0], found[1]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


EMITTED = (
    "diamond-cat", "attention", "encoder-dropout", "gru-cell-loop", "tied", "awkward", "heteroscedastic", "gate",
    "batch-norm-train", "hf-gpt2",
)  # fmt: skip


@by_name(EMITTED)
def test_programs_give_the_same_products(name: str, interpreted: list[Any]) -> None:
    plain, program = pair(case(name))
    v = torch.randn(plain.shape[1], dtype=torch.float64, device=device.NAME)
    assert off(program @ v, plain @ v) < 1e-12
    plain, program = pair(case(name), space="activation")
    v = torch.randn(plain.shape[1], 2, dtype=torch.float64, device=device.NAME)
    for mine, theirs in zip(program.parts(v), plain.parts(v), strict=True):
        assert float((mine - theirs).norm()) <= 1e-12 * float((plain @ v).norm())


def net(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *layers, nn.Linear(8, 3)).to(device.NAME, torch.float64)


X = torch.linspace(-1, 1, 30, dtype=torch.float64, device=device.NAME).reshape(6, 5)
Y = torch.arange(6, device=device.NAME) % 3


@pytest.mark.parametrize("name", ["encoder-eval", "batch-norm-train"])
def test_compiled_products_are_the_same(name: str) -> None:
    plain, program = pair(case(name))
    v = torch.randn(plain.shape[1], dtype=torch.float64, device=device.NAME)
    assert off(program @ v, plain @ v) < 1e-12


def test_other_values_need_no_compilation(interpreted: list[Any]) -> None:
    model = net(nn.Tanh())
    plain, program = (dh.HessianOperator(model, (X, Y), compile=flag) for flag in (False, True))
    v = torch.linspace(-1, 1, plain.shape[1], dtype=torch.float64)
    before = program @ v
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    plain.refresh()
    program.refresh()
    assert off(program @ v, plain @ v) < 1e-12 < off(before, plain @ v)
    assert len(interpreted) == 2


def test_batches_of_one_shape_share_programs(interpreted: list[Any]) -> None:
    batches = [(X, Y), (X.flip(0) * 2, Y)]
    plain, program = (dh.HessianOperator(net(nn.Tanh()), batches, compile=flag) for flag in (False, True))
    v = torch.linspace(-1, 1, plain.shape[1], dtype=torch.float64)
    assert off(program @ v, plain @ v) < 1e-12
    assert len(interpreted) == 2
    assert program._problem.loss == pytest.approx(plain._problem.loss, rel=1e-12)


@pytest.mark.parametrize("batch_mode", ["shared", "per_sample", "joint"])
@pytest.mark.parametrize("mode", ["exact", "gram", "probes"])
def test_maps_are_the_same(mode: str, batch_mode: str, interpreted: list[Any]) -> None:
    options: dict[str, Any] = {"mode": mode, "batch_mode": batch_mode, "points": ["1", "2", "0.weight"]}
    plain, program = (dh.analyze(net(nn.SiLU()), (X, Y), compile=flag, **options) for flag in (False, True))
    for key in ("resonance", "gn_gap", "tensor_norm"):
        np.testing.assert_allclose(getattr(program, key), getattr(plain, key), rtol=1e-9)
    assert interpreted


def test_values_before_a_gate_are_pytorchs_own(interpreted: list[Any]) -> None:
    for layer, compiled_parts in ((nn.ReLU(), 1), (nn.Hardtanh(), 1), (nn.MaxPool1d(1), 1), (nn.Tanh(), 2)):
        interpreted.clear()
        program = dh.HessianOperator(net(layer), (X, Y), compile=True)
        program @ torch.ones(program.shape[1], dtype=torch.float64, device=device.NAME)
        assert len(interpreted) == compiled_parts, layer


class Branch(nn.Module):
    """Python looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() if bool(x.sum() > 0) else self.layer(x).sin()


def test_a_batch_that_goes_another_way_has_another_program(interpreted: list[Any]) -> None:
    batches = [(X + 1, Y), (X - 1, Y)]
    torch.manual_seed(0)
    model = Branch()
    with pytest.warns(UserWarning, match="another way"):
        plain = dh.HessianOperator(model, batches)
        v = torch.linspace(-1, 1, plain.shape[1], dtype=torch.float64)
        expected = plain @ v
    with pytest.warns(UserWarning, match="another way"):
        found = dh.HessianOperator(model, batches, compile=True) @ v
    assert off(found, expected) < 1e-12


class ByHand(torch.autograd.Function):
    """An op that has no rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2


class Special(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x) if not x.requires_grad else ByHand.apply(x)


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(OptionError, match="True or False"):
        dh.HessianOperator(net(nn.Tanh()), (X, Y), compile="yes")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="True or False"):
        dh.analyze(net(nn.Tanh()), (X, Y), compile=1)  # type: ignore[arg-type]
    program = dh.HessianOperator(net(Special()), (X, Y), compile=True)
    with pytest.raises(CompileError, match="no rule"):
        program @ torch.ones(program.shape[1], dtype=torch.float64, device=device.NAME)


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    program = dh.HessianOperator(net(nn.Tanh()), (X, Y), compile=True)
    with pytest.raises(CompileError, match=r"no C\+\+ compiler"):
        program @ torch.ones(program.shape[1], dtype=torch.float64, device=device.NAME)


def test_a_compiler_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(part: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *args: [x * 1.001 for x in part(*args)]

    monkeypatch.setattr(compiled, "_compiled", wrong)
    program = dh.HessianOperator(net(nn.Tanh()), (X, Y), compile=True)
    with pytest.raises(CompileError, match="off by"):
        program @ torch.ones(program.shape[1], dtype=torch.float64, device=device.NAME)


def test_a_loss_that_has_become_infinite_is_an_error(interpreted: list[Any]) -> None:
    model = net(nn.Tanh())
    program = dh.HessianOperator(model, (X, Y), compile=True)
    v = torch.ones(program.shape[1], dtype=torch.float64, device=device.NAME)
    program @ v
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e308)  # finite still; the logits are not
    program.refresh()
    with pytest.raises(LossError):
        program @ v
