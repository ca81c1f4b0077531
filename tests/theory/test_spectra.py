"""Spectra of blocks against dense ones; the quadrature against both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn

import dag_hesse as dh
from dag_hesse.errors import OptionError
from dag_hesse.operators.lanczos import quadrature, tridiagonals
from dag_hesse.theory import spectra as module
from tests.theory.models import batch, chain, truth

NAMES = ["1", "3"]


@pytest.mark.parametrize("part", ["full", "gn", "tensor"])
def test_eigenvalues_and_distances(part: str) -> None:
    torch.manual_seed(0)
    model, data = chain(), batch()
    found, expected = dh.theory.block_spectra(model, data, points=NAMES, space="activation", part=part), []
    for name, values in zip(NAMES, found.values, strict=True):
        expected.append(torch.linalg.eigvalsh(truth(model, data, NAMES).block(name, name, part, "shared")).numpy())
        np.testing.assert_allclose(values, expected[-1], rtol=1e-8, atol=1e-12)
    assert found.exact.all()
    assert found.distance(scaled=False)[0, 1] == pytest.approx(wasserstein_distance(*expected), rel=1e-6)
    scaled = [x / np.abs(x).max() for x in expected]
    assert found.distance()[1, 0] == pytest.approx(wasserstein_distance(*scaled), rel=1e-6)
    assert (found.distance().diagonal() == 0).all() and "share below 0" in str(found)


def test_quadrature_is_close_to_all_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = chain(nn.SiLU, depth=1, width=8), batch(8, samples=6)
    exact = dh.theory.block_spectra(model, data, points=["0.weight"])
    monkeypatch.setattr(module, "_DENSE", 0)
    found = dh.theory.block_spectra(model, data, points=["0.weight"], probes=32)
    assert not found.exact.any() and found.weights[0].sum() == pytest.approx(1.0)
    span = exact.values[0].max() - exact.values[0].min()
    assert found.values[0].max() == pytest.approx(exact.values[0].max(), rel=1e-6)
    off = wasserstein_distance(exact.values[0], found.values[0], exact.weights[0], found.weights[0])
    assert off < 0.02 * span


class Quadratic(nn.Module):
    """Σ λ_i w_i² / 2: its Hessian is the diagonal matrix of λ = 1 … 6."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(6).double())

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return (values * self.w**2).sum() / 2


def test_quadrature_has_the_moments_of_one_direction() -> None:
    """Of diag(1 … 6) and one start: Σ w λ^k = xᵀAᵏx for all k below 2·3."""
    values = torch.arange(1.0, 7.0).double()
    start = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).double()
    operator = dh.HessianOperator(Quadratic(), (values, torch.zeros(6)), loss=lambda output, _: output)
    nodes, weights, _ = quadrature(*tridiagonals(operator, start, 3, "steps=")[0])
    unit = (start / start.norm()).squeeze(0)
    for k in range(6):
        assert (weights * nodes**k).sum() == pytest.approx(float((unit**2 * values**k).sum()), rel=1e-9)


def test_zero_blocks_have_zero_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DENSE", 0)
    found = dh.theory.block_spectra(chain(nn.ReLU), batch(), points=NAMES, space="activation", part="tensor")
    assert all(not x.any() for x in found.values) and not found.distance().any()


def test_refusals() -> None:
    with pytest.raises(OptionError, match="part"):
        dh.theory.block_spectra(chain(), batch(), part="GN")
    with pytest.raises(OptionError, match="steps"):
        dh.theory.block_spectra(chain(), batch(), steps=1)
