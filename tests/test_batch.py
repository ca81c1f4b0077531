"""Forms of batches, what may be infinite in them, and points of modules with several names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors
from tests.oracle import Truth, error


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * scale[:, None])


def _data() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4).double(), torch.rand(6).double(), torch.arange(6) % 3


def _assembled(model: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    names = [name for name, _ in model.named_parameters()]
    truth = Truth(model, run, [], names)
    return torch.cat([torch.cat([truth.full[v, w] for w in names], 1) for v in names])


def test_the_last_of_several_is_the_targets() -> None:
    x, scale, y = _data()
    model = Scaled().double()
    expected = _assembled(model, lambda: F.cross_entropy(model(x, scale), y))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, scale, y), batch_size=4)
    for batch in (
        (x, scale, y),
        [x, scale, y],
        ((x, scale), y),
        loader,
        [(x[:4], scale[:4], y[:4]), (x[4:], scale[4:], y[4:])],
    ):
        assert error(dh.HessianOperator(model, batch).dense(), expected) < 1e-10
    seen: list[Any] = []
    parts = [(x[:4], scale[:4], y[:4]), (x[4:], scale[4:], y[4:])]
    dh.HessianOperator(model, parts, reduction=lambda batch: seen.append(batch) or 1.0)  # type: ignore[func-returns-value]
    assert [len(batch) for batch in seen] == [3, 3]
    with pytest.raises(errors.BatchError, match=r"\(input, input, …, targets\)"):
        dh.HessianOperator(model, ("a", "b", y))


class Attention(nn.Module):
    """One head under a mask that is a buffer or is given."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("mask", torch.triu(torch.full((5, 5), -torch.inf), 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.q(x) @ x.transpose(1, 2) + (self.mask if mask is None else mask)
        return self.o((scores.softmax(-1) @ x).mean(1))


@pytest.mark.parametrize("given", [False, True])
def test_masks_may_be_infinite(given: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Attention().double(), torch.randn(3, 5, 4).double(), torch.tensor([0, 2, 1])
    mask = torch.tril(torch.full((5, 5), -torch.inf), -1).double()
    batch = (x, mask, y) if given else (x, y)
    expected = _assembled(model, lambda: F.cross_entropy(model(*batch[:-1]), y))
    assert error(dh.HessianOperator(model, batch).dense(), expected) < 1e-10
    report = dh.analyze(model, batch, points=["q"], mode="exact")
    truth = Truth(model, lambda: F.cross_entropy(model(*batch[:-1]), y), ["q"])
    assert error(report.block("q", "q"), truth.block("q", "q", "full", "shared")) < 1e-10


def test_what_may_not() -> None:
    x, scale, y = _data()
    model = Scaled().double()
    bad = x.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(errors.NonFiniteError, match=r"'inputs\[0\]' holds 1 NaN"):
        dh.HessianOperator(model, (bad, scale, y))
    targets = torch.randn(6, 3).double()
    targets[1, 1] = torch.inf
    with pytest.raises(errors.NonFiniteError, match="'targets' holds 1 NaN or infinite"):
        dh.HessianOperator(model, (x, scale, targets))
    with torch.no_grad():
        model.a.bias[0] = torch.nan
    with pytest.raises(errors.NonFiniteError, match=r"parameter 'a.bias' holds 1 NaN or infinite"):
        dh.HessianOperator(model, (x, scale, y))
    with torch.no_grad():
        model.a.bias[0] = torch.inf  # saturates: the loss and its derivatives are finite
    assert bool(dh.HessianOperator(model, (x, scale, y)).dense().isfinite().all())
    masked = Attention().double()
    masked.mask[0, 0] = torch.nan
    with pytest.raises(errors.NonFiniteError, match="buffer 'mask' holds 1 NaN"):
        dh.HessianOperator(masked, (torch.randn(3, 5, 4).double(), torch.tensor([0, 2, 1])))


class Named(nn.Module):
    """Layers with a second name in a list, and one activation for all."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.layers = nn.ModuleList([self.a, self.b, self.c])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))))


def test_modules_of_several_names() -> None:
    x, _, y = _data()
    torch.manual_seed(0)
    model = Named().double()
    assert dh.analyze(model, (x, y)).names == ("act[0]", "act[1]")
    assert dh.analyze(model, (x, y), space="parameter").names == ("a", "b", "c")
    assert dh.analyze(model, (x, y), points=["layers.0", "layers.1"]).names == ("a", "b")
    torch.manual_seed(0)
    twice = nn.Sequential(nn.Linear(4, 4), model.act, nn.Linear(4, 6), model.act, nn.Linear(6, 3)).double()
    assert dh.analyze(twice, (x, y)).names == ("1[0]", "1[1]")
