"""Second derivatives of activations; placements of skip connections."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dag_hesse as dh
from dag_hesse.errors import BatchError, OptionError
from tests.theory.models import batch, chain


@pytest.mark.parametrize("act", [nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus, nn.ReLU, nn.LeakyReLU])
def test_second_derivatives_against_autograd(act) -> None:
    torch.manual_seed(0)
    model, data = chain(act), batch()
    found = dh.theory.activation_curvature(model, data)
    assert found.names == ("1", "3", "5")
    for k, name in enumerate((1, 3, 5)):
        z = model[:name](data[0]).detach().requires_grad_()
        slope = torch.autograd.grad(act()(z).sum(), z, create_graph=True)[0]
        second = torch.autograd.grad(slope.sum(), z)[0] if slope.requires_grad else torch.zeros(1)
        assert found.mean_square[k] == pytest.approx(float(second.pow(2).mean()), rel=1e-9)
    if act in (nn.ReLU, nn.LeakyReLU):
        assert not found.mean_square.any()


def test_functions_in_a_forward_are_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 0.0]).double())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.dropout(torch.tanh(self.a(x)) * self.mask, 0.5, self.training))

    found = dh.theory.activation_curvature(Net().double(), batch())
    assert len(found.names) == 1 and "tanh" in found.ops[0] and "test_small.py" in found.names[0]
    assert "E[σ″²]" in str(found)
    with pytest.raises(BatchError, match="one batch"):
        dh.theory.activation_curvature(Net().double(), [batch(), batch()])


def weakest(rho: list[float], skips) -> float:
    """By the closure of the max-product matrix."""
    count = len(rho) + 1
    best = np.eye(count)
    for i, x in enumerate(rho):
        best[i, i + 1] = x
    for a, b in skips:
        best[a, b] = max(best[a, b], 1.0)
    for middle in range(count):
        best = np.maximum(best, best[:, middle : middle + 1] * best[middle : middle + 1, :])
    return best[np.triu_indices(count, 1)].min()


@pytest.mark.parametrize("rho", [[0.5] * 6, [0.9, 0.1, 0.8, 0.7, 0.2], [1.3, 0.4, 0.4, 2.0]])
@pytest.mark.parametrize("budget", [1, 2])
def test_placement_is_the_best_of_all(rho: list[float], budget: int) -> None:
    found = dh.theory.skip_placement(rho, budget)
    spans = [(a, b) for a, b in combinations(range(len(rho) + 1), 2) if b - a > 1]
    best = max(weakest(rho, skips) for skips in combinations(spans, budget))
    assert found.worst == pytest.approx(best) == weakest(rho, found.skips)
    assert found.uniform_worst == pytest.approx(weakest(rho, found.uniform))
    assert found.plain_worst == pytest.approx(weakest(rho, ()))


def test_proposition_75_is_false() -> None:
    """Uniform placement leaves ρ⁴ where ρ^(L/B) = ρ³ is promised, and another placement leaves ρ²."""
    found = dh.theory.skip_placement([0.5] * 6, 2)
    assert found.uniform_worst < 0.5**3
    assert found.worst > found.uniform_worst
    assert "uniform: 0 → 3, 3 → 6" in str(found)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="positive norms"):
        dh.theory.skip_placement([0.5, -1.0], 1)
    with pytest.raises(OptionError, match="at most as many"):
        dh.theory.skip_placement([0.5], 2)
    with pytest.raises(OptionError, match="placements"):
        dh.theory.skip_placement([0.5] * 30, 5)


def test_blocks_are_symmetric_at_kinks() -> None:
    """Remark 15: nothing is left to symmetrize, also where every ReLU sits at 0 and autograd chose its derivative."""
    model, data = chain(nn.ReLU), batch()
    for bias in (layer.bias for layer in model if isinstance(layer, nn.Linear)):
        bias.data.zero_()
    report = dh.analyze(model, (0.0 * data[0], data[1]), points=["0", "1", "2", "3"], mode="exact")
    for v in report.names:
        for w in report.names:
            torch.testing.assert_close(report.block(v, w), report.block(w, v).T)
