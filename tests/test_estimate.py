"""Estimates against exact values: bias, what their standard errors promise, adaptivity, streams, invariances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom, t
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.estimate.exact import spectral_norm
from dag_hesse.estimate.krylov import spectral_norms
from dag_hesse.estimate.norms import NormTable
from dag_hesse.experiments.models import mlp
from tests.models.zoo import case
from tests.oracle import Truth

SEEDS, PROBES = 200, 24
METRICS = ("resonance", "tensor_norm", "gn_norm")
# So often may a true claim be rejected, of all comparisons of a test together (Bonferroni).
CHANCE = 1e-3


def _problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    model = mlp([6, 12, 10, 8, 3], nn.SiLU).double()
    return model, (torch.randn(7, 6).double(), torch.arange(7) % 3)


@pytest.mark.parametrize(
    ("space", "batch_mode"),
    [("activation", "shared"), ("activation", "per_sample"), ("activation", "joint"), ("parameter", "shared")],
)
def test_estimates_keep_the_promise_of_their_standard_errors(space: str, batch_mode: str) -> None:
    model, batch = _problem()
    points = ["1", "3", "5"] if space == "activation" else ["0", "2.weight", "6"]
    same = {"points": points, "space": space, "batch_mode": batch_mode}
    exact = dh.analyze(model, batch, mode="exact", **same)
    options = {**same, "mode": "probes", "verify": "none"}  # the same capture as above
    runs = [dh.analyze(model, batch, probes=PROBES, seed=s, **options) for s in range(SEEDS)]
    upper = np.triu_indices(3)
    share = CHANCE / (len(METRICS) * len(upper[0]))
    bias, least = t.ppf(1 - share / 2, SEEDS - 1), binom.ppf(share, SEEDS, 0.95) / SEEDS
    for metric in METRICS:
        truth = exact.values[metric][upper]
        found = np.stack([run.values[metric][upper] for run in runs])
        stderr = np.stack([run.stderr[metric][upper] for run in runs])
        sampled = np.stack([run.method[metric][upper] == "probes" for run in runs]).all(0)
        assert sampled.any()
        z = (found - truth)[:, sampled] / stderr[:, sampled]
        error_of_mean = found[:, sampled].std(0, ddof=1) / SEEDS**0.5
        assert (np.abs(found[:, sampled].mean(0) - truth[sampled]) < bias * error_of_mean).all(), metric
        covered = (np.abs(z) < t.ppf(0.975, PROBES - 1)).mean(0)
        assert (covered >= least).all(), (metric, covered)


def test_ratios_keep_the_promise_of_their_standard_errors() -> None:
    model, batch = _problem()
    points = ["1", "3", "5"]
    exact = dh.analyze(model, batch, points=points, mode="exact")
    options = {"points": points, "mode": "probes", "verify": "none"}
    runs = [dh.analyze(model, batch, probes=32, seed=s, **options) for s in range(100)]
    every = [(metric, i, j) for metric in ("coupling", "stable_rank") for i, j in ((0, 1), (0, 2), (1, 2))]
    for metric, i, j in [*every, ("gn_gap", 0, 1)]:  # H_T at a linear head is zero
        found = np.array([run.values[metric][i, j] for run in runs])
        stderr = np.array([run.stderr[metric][i, j] for run in runs])
        assert (stderr > 0).all()
        covered = np.abs(found - exact.values[metric][i, j]) < 1.96 * stderr + 1e-2 * exact.values[metric][i, j]
        assert covered.mean() >= 0.90
        assert abs(found.mean() / exact.values[metric][i, j] - 1) < 0.05


def test_rtol_is_reached() -> None:
    model, batch = _problem()
    report = dh.analyze(model, batch, mode="probes", probes=4, rtol=0.05)
    sampled = report.method["resonance"] == "probes"
    assert sampled.any()
    for metric in METRICS:
        assert (report.stderr[metric] <= 0.05 * report.values[metric] + 1e-15).all()


def test_standard_errors_keep_their_promise_where_they_decide_when_to_stop() -> None:
    model, batch = _problem()
    points = ["1", "3", "5"]
    exact = dh.analyze(model, batch, points=points, mode="exact")
    options = {"points": points, "mode": "probes", "verify": "none", "rtol": 0.12}
    runs = [dh.analyze(model, batch, seed=s, **options) for s in range(SEEDS)]
    assert len({run.facts["sweeps"] for run in runs}) > 1  # some stop before others
    for metric in METRICS:
        i, j = (0, 1) if metric != "tensor_norm" else (0, 0)
        z = [(run.values[metric][i, j] - exact.values[metric][i, j]) / run.stderr[metric][i, j] for run in runs]
        assert np.mean(np.abs(z) < t.ppf(0.975, 7)) >= binom.ppf(CHANCE, SEEDS, 0.95) / SEEDS, metric


class _Dense:
    """Products with one dense block, as spectral norms ask for them."""

    groups, dtype, device = 1, torch.float64, torch.device("cpu")

    def __init__(self, block: Tensor) -> None:
        self.block, self.problem = block, self

    def dim(self, index: int) -> int:
        return self.block.shape[index]

    def room(self) -> int:
        return 1 << 20

    def whole(self, requests: Any, progress: Any) -> list[dict[int, Tensor]]:
        found = []
        for request in requests:
            (vectors,), (read,) = request.z.values(), request.reads
            found.append({read: vectors @ (self.block.mT if read == 0 else self.block)})
        return found


@pytest.mark.parametrize("second", [0.9, 0.93])
@pytest.mark.parametrize("share", [0.1, 0.2])
def test_a_ritz_value_that_rests_at_the_second_singular_value_is_not_taken(second: float, share: float) -> None:
    singular = torch.cat([torch.tensor([1.0, second]), torch.linspace(0.5, 0.05, 60)]).double()
    start = torch.full((1, 62), 0.1, dtype=torch.float64)
    start[..., :2] = torch.tensor([share, 1.0])  # little of the largest
    table = NormTable("shared")
    spectral_norms(_Dense(singular.diag()), table, {(0, 1): start}, tolerance=0.02)
    value, error = table.spectral[0, 1]
    assert 1 - value[0] <= error[0] <= 0.02 * value[0]


@pytest.mark.parametrize("size", [1, 32, 33, 70])
def test_the_spectral_norm_of_a_matrix_is_its_largest_singular_value(size: int) -> None:
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    corner = torch.zeros(size, size + 1)
    corner[-1, 0] = 1e-20
    near = torch.block_diag(turned, turned) * torch.linspace(1, 1 + 1e-7, 2 * size, dtype=torch.float64)
    for matrix in (
        torch.eye(size),
        torch.zeros(size, size),
        corner,
        turned,
        near,
        torch.randn(size, 1) @ torch.randn(1, size),
        torch.randn(2 * size, size) * 1e-30,
        torch.randn(size, 2 * size) * 1e18,
    ):
        expected = float(torch.linalg.matrix_norm(matrix.double(), 2))
        assert spectral_norm(matrix) == pytest.approx(expected, rel=1e-10, abs=0)
    assert spectral_norm(torch.zeros(0, size)) == 0
    assert np.isnan(spectral_norm(torch.full((size, size), torch.nan)))
    assert np.isinf(spectral_norm(torch.full((size, size), torch.inf)))


def test_the_spectral_norm_is_right_to_its_stated_error() -> None:
    model, batch = _problem()
    points = ["1", "3", "5"]
    truth = Truth(model, lambda: F.cross_entropy(model(batch[0]), batch[1]), points)
    exact = dh.analyze(model, batch, points=points, mode="exact")
    found = dh.analyze(model, batch, points=points, mode="probes", probes=64)
    for i, v in enumerate(points):
        for j, w in enumerate(points):
            block = truth.block(v, w, "full", "shared")
            rank = float(block.norm() ** 2 / torch.linalg.matrix_norm(block, 2) ** 2)
            assert exact.stable_rank[i, j] == pytest.approx(rank, rel=1e-9)
            assert abs(found.stable_rank[i, j] - rank) < 4 * found.stderr["stable_rank"][i, j] + 0.02 * rank


def test_same_seed_same_bits_and_the_global_generator_is_not_read() -> None:
    model, batch = _problem()
    first = dh.analyze(model, batch, mode="probes", seed=5)
    torch.manual_seed(77)
    second = dh.analyze(model, batch, mode="probes", seed=5)
    other = dh.analyze(model, batch, mode="probes", seed=6)
    assert all((first.values[m] == second.values[m]).all() for m in METRICS)
    assert (first.resonance != other.resonance).any()


@pytest.mark.parametrize("mode", ["exact", "gram", "probes"])
@pytest.mark.parametrize("batch_mode", ["shared", "per_sample"])
def test_a_stream_is_one_loss(mode: str, batch_mode: str) -> None:
    model, (x, y) = _problem()
    stream = [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]
    options = {"mode": mode, "batch_mode": batch_mode, "probes": 64}
    whole, streamed = dh.analyze(model, (x, y), **options), dh.analyze(model, iter(stream), **options)
    assert streamed.facts["loss"] == pytest.approx(whole.facts["loss"], rel=1e-12)
    for metric in METRICS:
        noise = 5 * np.hypot(whole.stderr[metric], streamed.stderr[metric])
        assert (np.abs(whole.values[metric] - streamed.values[metric]) <= 1e-10 * whole.values[metric] + noise).all()
    assert torch.allclose(whole.block("1", "5"), streamed.block("1", "5"), rtol=1e-10)


def test_a_stream_of_summed_losses_is_their_sum() -> None:
    model, (x, y) = _problem()
    loss = lambda output, targets: F.cross_entropy(output, targets, reduction="sum")  # noqa: E731
    whole = dh.analyze(model, (x, y), loss=loss, mode="exact")
    streamed = dh.analyze(model, [(x[:2], y[:2]), (x[2:], y[2:])], loss=loss, mode="exact")
    assert np.allclose(whole.resonance, streamed.resonance, rtol=1e-10)


def test_coupling_does_not_change_when_relu_layers_are_rescaled() -> None:
    """Theorem 44: W_v → αW_v, W_w → W_w/α leaves the function, and C of the weights' blocks."""
    torch.manual_seed(0)
    model = mlp([4, 6, 5, 6, 3]).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    batch = (torch.randn(8, 4).double(), torch.arange(8) % 3)
    names = ["0.weight", "2.weight", "4.weight", "6.weight"]
    before = dh.analyze(model, batch, points=names, mode="exact")
    with torch.no_grad():
        model[0].weight.mul_(3.0)
        model[4].weight.div_(3.0)
    after = dh.analyze(model, batch, points=names, mode="exact")
    assert np.allclose(before.coupling, after.coupling, rtol=1e-9)
    assert not np.allclose(before.resonance, after.resonance, rtol=1e-2)


def test_phi_is_the_share_of_the_off_diagonal_blocks() -> None:
    c = case("mlp-silu")
    names = ("0.weight", "2.weight", "4.weight")
    report = dh.analyze(c.model, c.batch, points=names, mode="exact")
    truth = Truth(c.model, c.run, [], names)
    squares = {pair: float(block.norm() ** 2) for pair, block in truth.full.items()}
    off = sum(value for (v, w), value in squares.items() if v != w)
    assert report.phi == pytest.approx(off / sum(squares.values()), rel=1e-10)


def test_the_erratum() -> None:
    """On x·tanh(Wx), (★) is exact; the paper's eq. (2) lacks the mixed term T[u;x,p] J[p←x] (design §2.1)."""
    c = case("gate")
    truth = Truth(c.model, c.run, c.names)
    report = dh.analyze(c.model, c.batch, points=list(c.names), mode="exact", batch_mode="joint")
    assert torch.allclose(report.block("body", "body"), truth.full["body", "body"], rtol=1e-10, atol=1e-14)
    # What eq. (2) leaves out: ∂u/∂x∂p met by J[p←x], u = x∘tanh(p), p = Wx + b, and its transpose.
    model, (x, y) = c.model, c.batch
    h = model.body(x)
    p = model.gate(h)
    u = (h * torch.tanh(p)).detach().requires_grad_()
    lam = torch.autograd.grad(F.cross_entropy(model.head(u), y), u)[0]
    mixed = [torch.diag(lam[b] * (1 - torch.tanh(p[b]) ** 2)) @ model.gate.weight for b in range(len(x))]
    term = torch.block_diag(*(m + m.T for m in mixed)).detach()
    without = truth.full["body", "body"] - term
    assert float((report.block("body", "body") - without).norm()) > 0.1 * float(term.norm())
    assert float(term.norm()) > 1e-3 * float(truth.full["body", "body"].norm())


def test_auto_takes_the_cheapest_exact_way() -> None:
    model, batch = _problem()
    assert (dh.analyze(mlp([6, 200, 200, 3]), (torch.randn(7, 6), batch[1])).method["resonance"] == "gram").all()
    assert set(dh.analyze(model, batch).method["resonance"].flat) <= {"exact", "gram"}  # d ≤ 2 · 32 probes
    wide = mlp([6, 200, 200, 3], nn.SiLU)
    methods = dh.analyze(wide, (torch.randn(7, 6), batch[1]), probes=8).method
    assert methods["resonance"][0, 0] == "probes"
    assert methods["resonance"][0, 1] == "gram"  # a linear head has no tensor part
    assert (methods["gn_norm"] == "gram").all()
