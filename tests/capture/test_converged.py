"""Classifiers that are as good as sure: little but rounding is left of their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.errors import LossError, UnfaithfulCaptureError
from tests.capture.test_looked_at import hessian_of


@pytest.mark.parametrize("gap", [20.0, 25.0, 30.0, 33.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_loss_that_has_converged(gap: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(6, 4).double()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([gap, -gap, 0.0]))
    y = torch.zeros(6, dtype=torch.long)
    found, expected = dh.HessianOperator(model, (x, y)).dense(), hessian_of(model, x, y)
    unsure = 1 - float(F.softmax(model(x).detach(), 1)[:, 0].min())
    assert (found - expected).norm() <= (1e-12 + 1e-15 / unsure) * expected.norm()


class _Hooked(nn.Sequential):
    """Its hidden gradient is changed on its way, which no recording sees."""

    def forward(self, x: Tensor) -> Tensor:
        z = self[0](x) * 1.0
        z.register_hook(lambda g: 2 * g)
        return self[2](self[1](z))


@pytest.mark.parametrize("gap", [20.0, 30.0, 36.0])
def test_no_rounding_excuses_a_gradient_that_is_another(gap: float) -> None:
    torch.manual_seed(0)
    model, x = _Hooked(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(6, 4).double()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([gap, -gap, 0.0]))
    with pytest.raises(UnfaithfulCaptureError, match="gradient"):
        dh.HessianOperator(model, (x, torch.zeros(6, dtype=torch.long)))


def test_an_infinite_loss_is_called_so() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.ones(6, 3).double()
    with torch.no_grad():
        model.bias.fill_(-800.0)
    with pytest.raises(LossError, match="the loss is inf"):
        dh.HessianOperator(model, (x, y), loss=nn.SoftMarginLoss())
