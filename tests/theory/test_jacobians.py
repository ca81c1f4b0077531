"""Norms of Jacobians against dense autograd; both ways of finding them agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.errors import BatchCouplingError, OptionError, PointError
from dag_hesse.theory import jacobians as module
from dag_hesse.theory import spectral as spectral_module
from tests.theory.models import batch, chain, jacobians, residual


def spectral(model: nn.Module, start: int, stop: int, x: torch.Tensor) -> np.ndarray:
    """‖J‖₂ of model[stop] by model[start], every sample."""
    at = model[: start + 1](x).detach()
    return torch.linalg.matrix_norm(jacobians(model[start + 1 : stop + 1], at), 2).numpy()


@pytest.fixture(params=["formed", "iterated"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "iterated":
        monkeypatch.setattr(module, "_DENSE", 0)
    return request.param


@pytest.mark.parametrize("make", [chain, residual])
def test_norms_along_all_paths(make, way: str) -> None:
    torch.manual_seed(0)
    model, data = make(), batch()
    names = ["1", "3", "5"] if make is chain else ["0", "1"]
    found = dh.theory.jacobian_norms(model, data, points=names, tolerance=1e-12)
    places = [*map(int, names), len(model) - 1]
    assert found.names == (*names, "output")
    for i, v in enumerate(places):
        for j, w in enumerate(places):
            if i < j:
                np.testing.assert_allclose(found.norms[i, j], spectral(model, v, w, data[0]), rtol=1e-9)
    assert (found.residual == 0.0).all() or way == "iterated"
    assert (found.residual <= 1e-12).all()


def test_edges_pass_no_other_point(way: str) -> None:
    """With a point inside the block, its skip connection is an edge of its own: the identity."""
    torch.manual_seed(0)
    model, data = residual(), batch()
    found = dh.theory.jacobian_norms(model, data, points=["0", "1.act", "1"], tolerance=1e-12)
    skip = found.edges[found.names.index("0"), found.names.index("1")]
    np.testing.assert_allclose(skip, 1.0, rtol=1e-9)
    assert found.graph.out_degree == 2
    assert found.graph.edges == ((0, 1), (0, 2), (1, 2), (2, 3))


def test_exponents_are_log_norms_per_edge() -> None:
    torch.manual_seed(0)
    model, data = chain(), batch()
    found = dh.theory.jacobian_norms(model, data, points=["1", "3", "5"])
    np.testing.assert_allclose(found.exponents[0, 2], np.log(spectral(model, 1, 5, data[0])) / 2, rtol=1e-12)
    assert np.isnan(found.exponents[2, 0]).all()
    at = model[:2](data[0]).detach()
    growth = jacobians(model[2:6], at).flatten(1).norm(dim=1).numpy() / np.sqrt(4)
    np.testing.assert_allclose(found.typical_exponents[0, 2], np.log(growth) / 2, rtol=1e-9)
    assert (found.typical_exponents[0, 2] <= found.exponents[0, 2]).all()
    assert found.mean_rho <= found.rho
    assert "from 1 to output: λ₁ =" in str(found)


def test_convolutions_and_several_batches() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.SiLU(), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(5, 1, 5, 5).double(), torch.arange(5) % 3
    found = dh.theory.jacobian_norms(model, [(x[:3], y[:3]), (x[3:], y[3:])], points=["1", "3"])
    at = model[:2](x).detach()
    expected = torch.autograd.functional.jacobian(lambda z: model[2:4](z).sum(0), at)  # (2,3,3, B, 2,5,5)
    expected = expected.reshape(18, 5, 50).transpose(0, 1)
    np.testing.assert_allclose(found.norms[0, 1], torch.linalg.matrix_norm(expected, 2).numpy(), rtol=1e-9)


def test_iteration_starts_anew_where_room_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_module, "_ROOM", 0)
    torch.manual_seed(0)
    matrices = torch.randn(3, 40, 30).double()
    start = torch.randn(3, 30).double()
    norms, residual = spectral_module.largest_singular_values(
        lambda x: torch.einsum("bmn,bn->bm", matrices, x),
        lambda y: torch.einsum("bmn,bm->bn", matrices, y),
        start,
        1e-10,
        400,
    )
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(matrices, 2))
    assert (residual <= 1e-10).all()


def test_refusals_come_before_work() -> None:
    data = batch()
    coupled = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(BatchCouplingError, match="BatchNorm"):
        dh.theory.jacobian_norms(coupled, data, points="0")
    with pytest.raises(PointError, match="is a parameter"):
        dh.theory.jacobian_norms(chain(), data, points="0.weight")
    twice = nn.Tanh()
    with pytest.raises(PointError, match="called 2 times"):
        dh.theory.jacobian_norms(nn.Sequential(nn.Linear(4, 3), twice, twice).double(), data, points="1")
    with pytest.raises(OptionError, match="tolerance"):
        dh.theory.jacobian_norms(chain(), data, tolerance=2)
