"""Norms, eigenvalues and solutions of very small and very large Hessians: scaling the loss scales them, and no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh


def _posed(dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return net.to(dtype), (torch.randn(12, 6).to(dtype), torch.arange(12) % 3)


def _operator(scale: float, dtype: torch.dtype = torch.float64) -> dh.HessianOperator:
    net, batch = _posed(dtype)
    return dh.HessianOperator(net, batch, loss=lambda o, y: scale * F.cross_entropy(o, y))


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-16, torch.float64), (1e12, torch.float64), (1e-8, torch.float32), (1e8, torch.float32)]
)
def test_eigenvalues(scale: float, dtype: torch.dtype) -> None:
    expected = np.linalg.eigvalsh(_operator(1.0).dense().numpy())
    H = _operator(scale, dtype)
    values, vectors = H.eigsh(2)
    np.testing.assert_allclose(values / scale, expected[-2:], rtol=2e-3)
    off = H.dense().numpy() @ vectors - vectors * values
    assert (np.linalg.norm(off, axis=0) < 2e-3 * values).all()


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e-6, 1.0, 1e5, 1e200, 1e290])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e6])
@pytest.mark.parametrize("method", ["minres", "cg"])
def test_solutions(size: float, scale: float, method: str) -> None:
    H = _operator(scale)
    torch.manual_seed(1)
    b, damping = size * torch.randn(H.shape[0]).double(), 0.6 * scale
    found = H.solve(b, damping, method=method)
    expected = torch.linalg.solve(H.dense() + damping * torch.eye(len(b)).double(), b)
    assert found.residual < 1e-6 and found.iterations
    assert ((found.x - expected) / size).norm() < 1e-4 * (expected / size).norm()


def test_sizes_of_columns_are_their_own() -> None:
    H = _operator(1.0)
    sizes = torch.tensor([1e-200, 1.0, 0.0, 1e200], dtype=torch.float64)
    b = torch.randn(H.shape[0], 4).double() * sizes
    found = H.solve(b, 0.6)
    expected = torch.linalg.solve(H.dense() + 0.6 * torch.eye(len(b)).double(), b)
    assert 0 < found.residual < 1e-6
    assert ((found.x - expected) / sizes.clamp_min(1e-250)).norm() < 1e-4
    assert H.solve(b, 0.6, maxiter=1).residual > 1e-6  # of any column


def test_what_a_matrix_does_not_reach_is_left() -> None:
    net, batch = _posed(torch.float64)
    G = dh.GGNOperator(net, batch)
    b = torch.ones(G.shape[0]).double()
    found = G.solve(b)
    dense = G.dense()
    least = b - dense @ (torch.linalg.pinv(dense, rtol=1e-10) @ b)
    assert 0.9 * least.norm() < found.residual * b.norm() < b.norm()


def test_the_gap_is_a_ratio_at_every_scale() -> None:
    net, batch = _posed(torch.float64)
    whole = dh.analyze(net, batch, points=["0"], progress=False)
    small = dh.analyze(net, batch, points=["0"], loss=lambda o, y: 1e-33 * F.cross_entropy(o, y), progress=False)
    np.testing.assert_allclose(small.gn_gap, whole.gn_gap, rtol=1e-10)


@pytest.mark.parametrize(
    "v0", [np.ones(3), torch.ones(2, 2), np.zeros(83), np.full(83, np.nan), "x", [1.0], np.ones(83, complex)]
)
def test_first_vectors_that_are_none(v0: Any) -> None:
    with pytest.raises(dh.errors.OptionError, match="v0"):
        _operator(1.0).eigsh(1, v0=v0)


@pytest.mark.parametrize("options", [{"maxiter": 0}, {"maxiter": "x"}, {"seed": -1}, {"seed": 10**30}])
def test_options_of_eigsh(options: dict[str, Any]) -> None:
    with pytest.raises(dh.errors.OptionError, match="expected an integer"):
        _operator(1.0).eigsh(1, **options)


def test_complex_parameters_are_refused() -> None:
    class Phases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real, self.phase = nn.Linear(4, 3).double(), nn.Parameter(torch.randn(3, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (self.real(x) * self.phase).abs()

    net, batch = Phases(), (torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1]))
    for call in (
        lambda: dh.HessianOperator(net, batch),
        lambda: dh.analyze(net, batch, space="parameter", points=["phase", "real"]),
        lambda: dh.Monitor(net, batch, every=1).step(0),
    ):
        with pytest.raises(dh.errors.PointError, match=r"'phase' is complex.*view_as_complex"):
            call()
    assert dh.HessianOperator(net, batch, param_filter="real").shape == (15, 15)


@pytest.mark.parametrize("scale", [2.0**66, 2.0**-83])  # powers of two: nothing else is rounded
def test_single_precision_at_its_ends(scale: float) -> None:
    net, batch = _posed(torch.float32)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return scale * F.cross_entropy(output, targets)

    grid, density = _operator(scale, torch.float32).spectral_density(20)
    own, usual = _operator(1.0, torch.float32).spectral_density(20)
    np.testing.assert_allclose(grid / scale, own, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(density * scale, usual, rtol=1e-4, atol=1e-6)
    few = {"points": ["0", "1"], "mode": "probes", "probes": 8, "progress": False}
    found, plain = dh.analyze(net, batch, loss=loss, **few), dh.analyze(net, batch, **few)
    np.testing.assert_allclose(found.stable_rank, plain.stable_rank, rtol=1e-5)
    np.testing.assert_allclose(found.resonance / scale, plain.resonance, rtol=1e-5)


def test_points_without_a_batch_axis_are_told() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x[torch.tensor([2, 0, 1, 4, 3])])))

    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.warns(UserWarning, match=r"batch axis is lost at aten.index.*'a' behind it is perturbed as a whole"):
        dh.HessianOperator(Turned(), batch, space="activation", points=["a"])
