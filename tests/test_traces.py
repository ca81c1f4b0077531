"""Estimates of trace and diagonal on matrices that they have not seen: unbiased, and as sure as they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors
from dag_hesse.operators.base import SymmetricOperator
from dag_hesse.operators.vectors import VectorForm


class Given(SymmetricOperator):
    """A matrix as an operator of two segments."""

    def __init__(self, matrix: Tensor, chunk: int = 7) -> None:
        n = len(matrix)
        self.matrix, self._chunk, self.products = matrix, chunk, 0
        self.form = VectorForm(("a", "b"), ((n - 10,), (10,)), matrix.dtype, matrix.device)

    @property
    def chunk(self) -> int:
        return self._chunk

    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        self.products += len(segments[0])
        assert len(segments[0]) <= self._chunk
        return list((torch.cat(segments, dim=1) @ self.matrix).split(self.form.sizes, dim=1))


N = 120
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda k: 1 + 0.2 * torch.cos(k),
    "polynomial": lambda k: (k + 1) ** -2.0,
    "exponential": lambda k: 0.8**k,
    "step": lambda k: torch.where(k < 15, 1.0, 1e-3) + 0 * k,
    "indefinite": lambda k: (k + 1) ** -1.0 * torch.where(k % 3 == 0, -1.0, 1.0),
}


def _matrix(spectrum: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))
    return (q * SPECTRA[spectrum](torch.arange(N, dtype=torch.float64))) @ q.T


@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_are_unbiased_and_covered(method: str, spectrum: str) -> None:
    scores, errors_ = [], []
    for seed in range(200):
        matrix = _matrix(spectrum, 1000 + seed // 4)
        value, stderr = Given(matrix).trace(48, seed=seed, return_stderr=True, method=method)
        errors_.append(float(value - matrix.trace()))
        scores.append(errors_[-1] / float(stderr))
    found, z = torch.tensor(errors_), torch.tensor(scores)
    assert abs(found.mean()) < 4 * found.std() / 200**0.5
    assert (z.abs() < 2.2).double().mean() > 0.9 and (z.abs() < 5).all()
    assert (z.abs() > 0.5).double().mean() > (0.1 if method == "xtrace" else 0.35)  # nor are they too wide


@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_diagonals_are_unbiased_and_covered(method: str, spectrum: str) -> None:
    off, inside, wide = [], [], []
    for seed in range(100):
        matrix = _matrix(spectrum, 2000 + seed // 4)
        value, stderr = Given(matrix).diagonal(48, seed=seed, return_stderr=True, method=method)
        off.append(value - matrix.diagonal())
        inside.append(off[-1].abs() < 2.2 * stderr)
        wide.append(off[-1].abs() > 0.5 * stderr)
    every = torch.stack(off)
    assert (every.mean(0).abs() < 5 * every.std(0) / 10).all()
    assert torch.stack(inside).double().mean() > 0.9
    assert torch.stack(wide).double().mean() > (0.1 if method == "xdiag" else 0.35)


@pytest.mark.parametrize("better, usual", [("hutch++", "hutchinson"), ("xtrace", "hutchinson"), ("xtrace", "hutch++")])
def test_sketches_pay_where_eigenvalues_decay(better: str, usual: str) -> None:
    def error(method: str) -> float:
        found = []
        for seed in range(30):
            matrix = _matrix("exponential", seed)
            found.append(float(Given(matrix).trace(48, seed=seed, method=method) - matrix.trace()) ** 2)
        return sum(found) ** 0.5

    assert error(better) < error(usual) / 3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_matrices_of_low_rank_are_exact(rank: int, dtype: torch.dtype, tolerance: float) -> None:
    factor = torch.randn(N, rank, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrix = (factor @ factor.T).to(dtype)
    size = float(matrix.trace()) + 1e-30
    rough = max(tolerance, 1e-7)  # of errors that are 0
    for method in ("hutch++", "xtrace"):
        value, stderr = Given(matrix).trace(24, return_stderr=True, method=method)
        assert abs(float(value - matrix.trace())) <= tolerance * size and float(stderr) <= rough * size
    value, stderr = Given(matrix).diagonal(24, return_stderr=True, method="xdiag")
    assert float((value - matrix.diagonal()).abs().max()) <= tolerance * size and float(stderr.max()) <= rough * size


def test_products_are_counted_and_do_not_hang_on_chunks() -> None:
    matrix = _matrix("polynomial", 5)
    for method, most in (("hutch++", 47), ("xtrace", 46), ("hutchinson", 47)):
        one, other = Given(matrix), Given(matrix, chunk=100)
        before = torch.get_rng_state()
        assert torch.allclose(one.trace(47, seed=2, method=method), other.trace(47, seed=2, method=method), rtol=1e-10)
        assert one.products == other.products == most and torch.equal(torch.get_rng_state(), before)
    exact = Given(matrix)
    assert torch.allclose(exact.trace(method="exact"), matrix.trace(), rtol=1e-12) and exact.products == N
    value, stderr = exact.diagonal(method="exact", return_stderr=True)
    assert torch.allclose(value, matrix.diagonal()) and not stderr.any()


def test_what_cannot_be_estimated_so() -> None:
    given = Given(_matrix("flat", 0))
    for wrong in (
        {"method": "xtraces"},
        {"matvecs": 11, "method": "xtrace"},
        {"matvecs": 20, "method": "exact"},
        {"matvecs": 120},
    ):
        with pytest.raises(errors.OptionError):
            given.trace(**wrong)
    with pytest.raises(errors.OptionError, match="'xdiag'"):
        given.diagonal(method="xtrace")
    with pytest.raises(errors.OptionError, match="seed"):
        given.trace(24, seed=0.5, method="xtrace")  # type: ignore[arg-type]
    model, batch = nn.Linear(90, 2), (torch.randn(4, 90), torch.tensor([0, 1, 1, 0]))
    with pytest.raises(errors.MemoryBudgetError, match="a sketch of 182 rows by 64 products"):
        dh.HessianOperator(model, batch, memory="40KB").trace(method="xtrace")


def test_the_gauss_newton_diagonal_takes_its_factor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    batch = torch.randn(4, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    G = dh.GGNOperator(model, batch)
    dense = G.dense()
    sweeps = G._problem.sweeps
    assert torch.allclose(G.diagonal(method="exact"), dense.diagonal(), atol=1e-13)
    assert torch.allclose(G.trace(method="exact"), dense.trace(), rtol=1e-12)
    assert G._problem.sweeps == sweeps  # no probe
    H = dh.HessianOperator(model, batch)
    assert torch.allclose(H.diagonal(method="exact"), H.dense().diagonal(), atol=1e-13)
    block = H.block("0.weight", "0.weight")
    for method in ("exact", "hutch++", "xtrace"):
        assert float(block.trace(method=method)) == pytest.approx(float(block.dense().trace()), abs=0.1)
    assert float(block.trace(method="exact")) == pytest.approx(float(block.dense().trace()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_have_estimates_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    x, y = torch.randn(6, 12).to(dtype), torch.arange(6) % 3
    G = dh.GGNOperator(model, (x, y))
    wide = dh.GGNOperator(model, (x, y), float64=True)
    exact, size = wide.trace(method="exact"), float(wide.trace(method="exact"))
    for options in ({"method": "exact"}, {"method": "hutch++"}, {"method": "xtrace"}):
        found = G.trace(**options)  # type: ignore[arg-type]
        assert found.dtype == torch.float32 and abs(float(found - exact)) < 0.05 * size
    for options in ({"method": "exact"}, {"method": "xdiag"}):
        diagonal = G.diagonal(**options)  # type: ignore[arg-type]
        assert diagonal.dtype == torch.float32
        assert float((diagonal - wide.diagonal(method="exact")).abs().sum()) < 0.1 * size
    report = dh.analyze(model, (x, y), points=["0", "1"])
    assert report.facts["dtype"] in str(report) and report.resonance.dtype == "float64"
