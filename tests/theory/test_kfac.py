"""Errors from norms of blocks against those of the dense matrix."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.errors import BatchError, DependencyError, MemoryBudgetError, OptionError
from tests.theory.models import batch, chain, residual


@pytest.mark.parametrize("make", [chain, residual])
@pytest.mark.parametrize("space", ["parameter", "activation"])
def test_bands_against_the_dense_matrix(make, space: str) -> None:
    torch.manual_seed(0)
    model, data = make(), batch()
    report = dh.analyze(model, data, space=space, mode="exact")
    found = dh.theory.band_errors(report)
    dims = [point.dim for point in report.points]
    blocks = [[report.block(v, w) for w in range(len(dims))] for v in range(len(dims))]
    whole = torch.cat([torch.cat(row, dim=1) for row in blocks])
    for width, error in enumerate(found.band_error):
        kept = [
            [block * float(found.distance[v, w] <= width) for w, block in enumerate(row)]
            for v, row in enumerate(blocks)
        ]
        banded = torch.cat([torch.cat(row, dim=1) for row in kept])
        assert error == pytest.approx(float((whole - banded).norm() / whole.norm()), rel=1e-6, abs=1e-12)
    diagonal = torch.block_diag(*(blocks[v][v] for v in range(len(dims))))
    expected = float((whole - diagonal).norm() / whole.norm())
    assert found.block_diagonal_error == pytest.approx(expected, rel=1e-6)
    assert found.by_distance.sum() == pytest.approx(found.phi)
    assert "Φ" in str(found)


def test_off_diagonal_blocks_may_be_nearly_everything() -> None:
    """A linear chain at a small rate: sρ < 1, and most of ‖H‖² is not on the diagonal; Corollary 29 does not follow."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4, bias=False).double() for _ in range(4)]
    for layer in layers:
        layer.weight.data = 0.9 * torch.eye(4).double()
    data = torch.randn(6, 4).double(), 5.0 * torch.randn(6, 4).double()
    model = nn.Sequential(*layers)
    assert dh.theory.jacobian_norms(model, data, points=["0", "1", "2"]).rho < 1
    found = dh.theory.band_errors(dh.analyze(model, data, space="parameter", points=["0", "1", "2", "3"]))
    assert found.phi > 0.7
    assert np.isfinite(found.band_error).all()


def test_a_report_says_it_without_its_model() -> None:
    report = dh.analyze(chain(), batch(), space="parameter")
    assert dh.theory.band_errors(pickle.loads(pickle.dumps(report))).phi == dh.theory.band_errors(report).phi


def test_parts_of_kfacs_error() -> None:
    pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model, data = chain(depth=1), batch(samples=6)
    before = [p.clone() for p in model.parameters()]
    found = dh.theory.kfac_error(model, data)
    report = dh.analyze(model, data, space="parameter", points=list(found.names), mode="exact")
    order = [report.index(name) for name in found.names]
    np.testing.assert_allclose(found.size, report.resonance.diagonal()[order], rtol=1e-8)
    gap = (report.tensor_norm.diagonal() / report.resonance.diagonal())[order]
    np.testing.assert_allclose(found.blocks["ggn"], gap, rtol=1e-6, atol=1e-12)
    assert found.whole["exact"] == pytest.approx(np.sqrt(report.phi), rel=1e-6)
    assert all(found.whole["exact"] <= error for error in found.whole.values())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_kfac_is_exact_for_one_sample_and_a_linear_model() -> None:
    """Then every GGN block is one Kronecker product, and H_T between a layer's own weights is zero."""
    pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    found = dh.theory.kfac_error(nn.Sequential(nn.Linear(3, 2)).double(), batch(3, samples=1))
    np.testing.assert_allclose(found.blocks["kfac"], 0.0, atol=1e-7)
    np.testing.assert_allclose(found.blocks["ggn"], 0.0, atol=1e-12)


def test_refusals_of_kfac(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batch()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "curvlinops", None)
        with pytest.raises(DependencyError, match="dag-hesse\\[curvlinops\\]"):
            dh.theory.kfac_error(chain(), data)
    with pytest.raises(OptionError, match="LayerNorm"):
        dh.theory.kfac_error(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).double(), data)
    with pytest.raises(BatchError, match="one batch"):
        dh.theory.kfac_error(chain(), [data])
    with pytest.raises(MemoryBudgetError, match="band_errors"):
        dh.theory.kfac_error(nn.Linear(4, 1000).double(), data)
