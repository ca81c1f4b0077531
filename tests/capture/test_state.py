"""What a run leaves behind: nothing, to the bit, whatever the forward changes and whether it fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors
from tests.capture.common import X, Y


class Fails(nn.Module):
    """Changes everything that it can, then fails if it is told to."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fail, self.seen, self.cache = fail, [0], {"k": [1]}
        self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(4, 3), nn.BatchNorm1d(4)
        self.register_buffer("k", torch.tensor(0.0))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        self.k += 1
        self.seen.append(self.k)
        self.cache["k"].append(2)
        self.cache["new"] = x
        self.a.weight.data = self.a.weight.data * 2
        with torch.no_grad():
            self.b.bias.add_(1.0)
        self.extra = x
        np.random.rand()
        torch.rand(1)
        self.a(x).sum().backward(retain_graph=True)
        if self.fail:
            raise ValueError("as told")
        return self.b(self.norm(self.a(x)).sin())


def _picture(model: Fails) -> Any:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {n: (id(t), t.data_ptr(), t._version, t.requires_grad, t.detach().clone()) for n, t in tensors.items()}
    return kept, list(model.seen), copy.deepcopy(model.cache), sorted(vars(model)), [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ], [p.grad for p in model.parameters()]  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "capture": lambda m, b: dh.capture(m, b),
    "structure": lambda m, b: dh.structure(m, b),
    "analyze": lambda m, b: dh.analyze(m, b, points=["a", "norm"]),
    "per sample": lambda m, b: dh.analyze(m, b, batch_mode="per_sample"),
    "operator": lambda m, b: dh.HessianOperator(m, b).dense(),
    "hvp": lambda m, b: dh.hvp(m, b, torch.ones(39).double()),
    "GGN": lambda m, b: dh.GGNOperator(m, b) @ torch.ones(39).double(),
    "no proof": lambda m, b: dh.HessianOperator(m, b, verify="none").dense(),
    "profile": lambda m, b: dh.profile(m, b),
    "unknown point": lambda m, b: dh.analyze(m, b, points=["nowhere"]),
    "unknown output": lambda m, b: dh.analyze(m, b, output="nowhere"),
    "wrong vector": lambda m, b: dh.hvp(m, b, torch.ones(3).double()),
    "bad loss": lambda m, b: dh.analyze(m, b, loss=lambda o, t: o),
    "failing loss": lambda m, b: dh.analyze(m, b, loss=lambda o, t: o.nowhere),
    "constant loss": lambda m, b: dh.analyze(m, b, loss=lambda o, t: torch.ones(()).double()),
}


@pytest.mark.parametrize("fail", [False, True], ids=["", "failing"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_of_a_run_stays_behind(call: str, training: bool, fail: bool) -> None:
    model, x = Fails(fail).train(training), X.clone()
    before, states = _picture(model), (torch.get_rng_state(), np.random.get_state()[1].copy())
    try:
        CALLS[call](model, (x, Y))
        assert not fail
    except errors.DagHesseError:
        pass
    assert _same(_picture(model), before)
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)
