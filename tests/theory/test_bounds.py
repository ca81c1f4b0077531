"""The bounds hold where they are proved; where the paper's statement goes further, it fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dag_hesse as dh
from tests.theory.models import batch, chain, residual, truth


def scaled(model: nn.Sequential, norm: float) -> nn.Sequential:
    """Every linear layer has this spectral norm."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= norm / torch.linalg.matrix_norm(module.weight.data, 2)
    return model


@pytest.mark.parametrize("act", [nn.Tanh, nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("make", [chain, residual])
def test_theorem_25_holds_wherever_all_paths_pass(make, act) -> None:
    torch.manual_seed(1)
    model, data = make(act), batch()
    names = ["1", "3", "5"] if make is chain else ["0", "1"]
    found = dh.theory.resonance_bounds(model, data, points=names)
    expected, count = truth(model, data, names), len(names)
    assert found.lyapunov.holds.all()
    assert found.lyapunov.applies[:count, :count].all()
    for i, v in enumerate(names):
        for j, w in enumerate(names):
            exact = expected.block(v, w, "full", "per_sample", len(data[0])).flatten(1).norm(dim=1).numpy()
            np.testing.assert_allclose(found.lyapunov.measured[i, j], exact, rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(np.einsum("vvb->vb", found.lyapunov.slack), 1.0)


def test_theorem_25_says_nothing_of_a_bypassed_point() -> None:
    model = residual()
    found = dh.theory.resonance_bounds(model, batch(), points=["0", "1.act", "1"])
    assert not found.lyapunov.applies[0, 1].any()  # the skip connection goes round the branch
    assert found.lyapunov.applies[0, 2].all()
    assert "Thm 25" in str(found)


@pytest.mark.parametrize("make", [chain, residual])
def test_theorem_77_holds_below_one(make) -> None:
    torch.manual_seed(2)
    model, data = scaled(make(), 0.4), batch()
    names = ["1", "3", "5"] if make is chain else ["0.linear", "1.linear"]
    found = dh.theory.resonance_bounds(model, data, points=names)
    assert (found.rate < 1).all()
    assert found.global_rate.applies.all()
    assert found.global_rate.holds.all()


def test_corollary_26_fails_above_one() -> None:
    """R_GN(v, v) of a chain that expands is above ‖∇²L‖, its bound at distance 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    for layer in model[1:]:
        layer.weight.data = 2.0 * torch.eye(3).double()
    found = dh.theory.resonance_bounds(model, batch(3), points=["0", "1"])
    constant = found.global_rate.measured[-1, -1]
    np.testing.assert_allclose(found.global_rate.measured[0, 0], 16.0 * constant)
    assert not found.global_rate.applies.any()


def test_averaged_constant_is_no_constant_for_averaged_blocks() -> None:
    """‖mean_b H_b[v,v]‖ may exceed ‖mean_b ∇²L_b‖ (sρ)⁰: averaging ∇²L cancels what the blocks add up."""

    class Turn(nn.Module):
        def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
            v = dh.tap(x * 1.0, "v")
            return 0.95 * torch.einsum("bij,bj->bi", turn, v)

    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    turns, pick = torch.stack([torch.eye(2).double(), swap]), torch.eye(2).double()

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (out * target).pow(2).sum(1).mean() / 2

    data = torch.randn(2, 2).double(), turns, pick  # sample b's loss sees coordinate b alone
    report = dh.analyze(Turn(), data, loss=loss, points=["v", "output"], mode="exact")
    v, out = report.gn_norm.diagonal()
    assert v > out + 0.1  # 0.95² against 1/√2
    assert dh.theory.resonance_bounds(Turn(), data, loss=loss, points="v").global_rate.holds.all()


def test_float32_rounding_is_no_violation() -> None:
    model = chain(nn.ReLU).float()
    x, y = batch()
    found = dh.theory.resonance_bounds(model, (x.float(), y), points=["1", "3"], loss=F.cross_entropy)
    assert found.lyapunov.holds.all()
