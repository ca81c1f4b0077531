"""Negative eigenpairs against dense autograd; escape directions go down, and the other sign need not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import dag_hesse as dh
from dag_hesse.errors import OptionError
from dag_hesse.theory import negative as module
from tests.oracle import Leaves
from tests.theory.models import batch, chain, residual, truth


def loss_at(model: nn.Module, data, step: dict[str, torch.Tensor]) -> float:
    moved = {name: p + step.get(name, 0.0) for name, p in model.named_parameters()}
    return F.cross_entropy(functional_call(model, moved, data[0]), data[1]).item()


def dense(model: nn.Module, data) -> torch.Tensor:
    """The Hessian over all parameters, by torch.autograd.functional."""
    names, sizes = zip(*((n, p.numel()) for n, p in model.named_parameters()), strict=True)
    shapes = [p.shape for p in model.parameters()]

    def run(theta: torch.Tensor) -> torch.Tensor:
        pieces = [x.reshape(s) for x, s in zip(theta.split(sizes), shapes, strict=True)]
        return F.cross_entropy(functional_call(model, dict(zip(names, pieces, strict=True)), data[0]), data[1])

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.autograd.functional.hessian(run, theta)


@pytest.fixture(params=["dense", "iterated"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "iterated":
        monkeypatch.setattr(module, "_DENSE", 0)
    return request.param


def test_eigenpairs_in_parameter_space(way: str) -> None:
    torch.manual_seed(0)
    model, data = chain(depth=1), batch()
    found = dh.theory.negative_curvature(model, data, k=3)
    values = torch.linalg.eigvalsh(dense(model, data)).numpy()
    np.testing.assert_allclose(found.values, values[:3], rtol=1e-8)
    assert (found.residual < 1e-8).all()
    np.testing.assert_allclose(found.gn_part + found.tensor_part, found.values, rtol=1e-8)
    assert (found.gn_part >= -1e-12).all() and (found.tensor_part <= found.values + 1e-12).all()  # Theorem 83
    mass = -values[values < -1e-13].sum()
    assert found.complete == (way == "dense")
    assert found.mass == pytest.approx(mass) if found.complete else found.mass < mass


@pytest.mark.parametrize("make", [chain, residual])
def test_the_loss_falls_as_predicted(make) -> None:
    torch.manual_seed(1)
    model, data = make(nn.SiLU), batch()
    found = dh.theory.negative_curvature(model, data, k=3)
    before = loss_at(model, data, {})
    for number in range(len(found.values)):
        step = 1e-3
        change = loss_at(model, data, {n: step * x for n, x in found.direction(number).items()}) - before
        assert change < 0
        assert change == pytest.approx(found.predicted(step, number), rel=1e-2, abs=1e-9)


def test_a_small_hessian_s_eigenvalues_are_as_right_as_a_large_one_s() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 5))
    x, y = torch.randn(20, 30), torch.randn(20, 5)
    values = [
        dh.theory.negative_curvature(model, (x, y), loss=lambda o, t, c=c: c * (o - t).pow(2).mean(), k=3).values / c
        for c in (1.0, 1e-14)
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize("width", [20, 40], ids=["dense", "Lanczos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_negative_curvature(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(width, 30).to(dtype)  # convex, and flat along most directions
    found = dh.theory.negative_curvature(model, (torch.randn(10, width, dtype=dtype), torch.randn(10, 30, dtype=dtype)))
    assert (len(found.values), found.mass, found.complete) == (0, 0, True)


def test_sign_matters_away_from_a_saddle() -> None:
    """Proposition 85 says ±; with a gradient one of the two leads uphill."""
    torch.manual_seed(1)
    model, data = chain(nn.SiLU), batch()
    found = dh.theory.negative_curvature(model, data)
    number = int(np.argmin(found.slope))
    back = {n: -1e-3 * x for n, x in found.direction(number).items()}
    assert loss_at(model, data, back) > loss_at(model, data, {})


def test_activation_space() -> None:
    torch.manual_seed(3)
    model, data = chain(nn.SiLU), batch()
    x, y = data
    found = dh.theory.negative_curvature(model, data, space="activation", points=["0", "2"])
    expected = truth(model, data, ["0", "2"])
    blocks = [torch.cat([expected.block(v, w, "full", "shared") for w in ("0", "2")], dim=1) for v in ("0", "2")]
    values = torch.linalg.eigvalsh(torch.cat(blocks)).numpy()
    np.testing.assert_allclose(found.values, values[values < -1e-12][:3], rtol=1e-7)
    handles = [
        model[int(name)].register_forward_hook(lambda m, a, out, e=1e-3 * e: out + e)
        for name, e in found.direction().items()
    ]
    moved = F.cross_entropy(model(x), y).item()
    for handle in handles:
        handle.remove()
    assert moved < F.cross_entropy(model(x), y).item()


def test_none_between_activations_of_a_relu_network() -> None:
    """Remark 84: there H = H_GN, which is positive semidefinite."""
    torch.manual_seed(0)
    found = dh.theory.negative_curvature(chain(nn.ReLU), batch(), space="activation", points=["0", "2", "4"])
    assert found.mass == 0.0 and len(found.values) == 0 and str(found) == "m₋ = 0"
    with pytest.raises(OptionError, match="direction 0 of 0"):
        found.direction()


def test_a_loss_that_is_not_convex_has_some_in_the_gn_part() -> None:
    torch.manual_seed(0)
    model, (x, _) = chain(nn.ReLU, depth=1), batch()
    found = dh.theory.negative_curvature(model, (x, x[:, :3]), loss=lambda out, t: -(out - t).pow(2).mean(), k=1)
    assert found.gn_part[0] < 0


def test_refusals() -> None:
    with pytest.raises(OptionError, match="k=0"):
        dh.theory.negative_curvature(chain(), batch(), k=0)


@pytest.mark.parametrize("space", ["parameter", "activation"])
def test_gradient_over_several_batches(space: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = residual(), batch(samples=5)
    names = {"parameter": ["0.linear.weight", "2.bias"], "activation": ["0.linear", "0"]}[space]
    split = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = dh.HessianOperator(model, split, space=space, points=names).gradient
    if space == "parameter":
        leaves = [model.get_parameter(name) for name in names]
        expected = torch.autograd.grad(F.cross_entropy(model(x), y), leaves)
    else:
        with Leaves(model, names) as hooked:
            value = F.cross_entropy(model(x), y)
        expected = [g.sum(0) for g in torch.autograd.grad(value, [hooked.made[name][0] for name in names])]
    torch.testing.assert_close(found, torch.cat([g.reshape(-1) for g in expected]))
