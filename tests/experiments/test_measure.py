"""What the experiments measure, against dense autograd with additive leaves and torch.func in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.experiments import ablation, exp2, exp4, exp5, exp6
from dag_hesse.experiments.measure import bound, curvature, exact_map, gaps, growth, pair_gap, resonance, step_jacobians
from dag_hesse.experiments.mlps import DiamondMLP, bottleneck_mlp, plain_mlp, residual_mlp
from dag_hesse.experiments.models import ToyAttention, resnet18
from tests.oracle import Truth

BATCH = 5
CLOSE = {"rel": 1e-9, "abs": 1e-14}


def made(build: Callable[[], nn.Module], classes: int = 4) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return build().double().eval(), (torch.randn(BATCH, 7).double(), torch.arange(BATCH) % classes)


def truth(model: nn.Module, batch: tuple[Tensor, Tensor], names: list[str]) -> dict[str, dict[tuple[str, str], Tensor]]:
    """The averaged blocks of both parts, dense."""
    x, y = batch
    loss = F.mse_loss if y.is_floating_point() else F.cross_entropy
    dense = Truth(model, lambda: loss(model(x), y), names)
    pairs = list(itertools.product(names, names))
    return {part: {pair: dense.block(*pair, part, "shared") for pair in pairs} for part in ("full", "gn", "tensor")}


CHAINS = {
    "plain": lambda: plain_mlp(4, 5, 4, "gelu", inputs=7),
    "spectral": lambda: plain_mlp(3, 5, 4, norm=False, spectral=True, inputs=7),
    "residual": lambda: residual_mlp(4, 5, 4, "silu", inputs=7),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_resonance_and_gaps_by_distance(kind: str) -> None:
    model, batch = made(CHAINS[kind])
    names = [f"blocks.{k}" for k in range(len(model.blocks))]
    dense, report = truth(model, batch, names), exact_map(model, batch, "blocks.*")
    found = resonance(report) | gaps(report)
    norms = {part: {pair: float(block.norm()) for pair, block in blocks.items()} for part, blocks in dense.items()}
    sums = np.zeros(2)
    for d in range(len(names)):
        pairs = [(names[k], names[k + d]) for k in range(len(names) - d)]
        r = [norms["full"][pair] for pair in pairs]
        assert found[f"R {d}"] == pytest.approx(np.mean(r), **CLOSE)
        c = [norms["full"][v, w] / math.sqrt(norms["full"][v, v] * norms["full"][w, w]) for v, w in pairs]
        assert found[f"C {d}"] == pytest.approx(np.mean(c), **CLOSE)
        ranks = [(norms["full"][pair] / float(torch.linalg.matrix_norm(dense["full"][pair], 2))) ** 2 for pair in pairs]
        assert found[f"D {d}"] == pytest.approx(np.mean(ranks), **CLOSE)
        own = np.array([sum(norms["tensor"][pair] for pair in pairs), sum(norms["gn"][pair] for pair in pairs)])
        sums += own
        assert found[f"T {d}"] == pytest.approx(own[0], rel=1e-9, abs=1e-13)
        assert found[f"GN {d}"] == pytest.approx(own[1], **CLOSE)
        assert found[f"gap {d}"] == pytest.approx(own[0] / own[1], rel=1e-9, abs=1e-11)
    assert found["gap"] == pytest.approx(sums[0] / sums[1], rel=1e-9, abs=1e-11)
    if kind == "spectral":
        assert found["gap"] == 0.0


def test_the_model_and_its_precision_stay() -> None:
    model, (x, y) = made(CHAINS["plain"])
    model = model.float().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    growth(model, (x.float(), y))
    exact_map(model, (x.float(), y), "blocks.*")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", CHAINS)
def test_growth_against_jacobians_by_torch_func(kind: str) -> None:
    model, batch = made(CHAINS[kind])
    start = model.projection(batch[0])
    blocks, h = [], start
    for block in model.blocks:
        blocks.append(torch.stack([torch.func.jacrev(block)(row) for row in h]))
        h = block(h)
    whole = blocks[0]
    for block in blocks[1:]:
        whole = block @ whole
    count, width = len(blocks), whole.shape[-1]
    largest = torch.stack([torch.linalg.svdvals(block)[:, 0] for block in blocks])
    found = growth(model, batch)
    assert found["rho"] == pytest.approx(float(largest.mean(1).max()), rel=1e-9)
    assert found["rho mean"] == pytest.approx(float(largest.mean()), rel=1e-9)
    assert found["rho sample"] == pytest.approx(float(largest.max()), rel=1e-9)
    assert found["lambda"] == pytest.approx(float(torch.linalg.svdvals(whole)[:, 0].log().mean()) / count, rel=1e-9)
    square = whole.pow(2).sum((1, 2)) / width
    assert found["lambda typical"] == pytest.approx(float(square.log().mean()) / (2 * count), rel=1e-9)
    if kind != "spectral":  # dead units leave no direction
        q, total = torch.eye(width).double().expand(BATCH, -1, -1), torch.zeros(BATCH, width).double()
        for block in blocks:  # one step after the other, as Benettin's algorithm
            q, r = torch.linalg.qr(block @ q)
            total += r.diagonal(dim1=1, dim2=2).abs().log()
        assert found["lambda published"] == pytest.approx(float((total / count).mean(0).max()), rel=1e-6)


def test_growth_is_that_of_the_theory() -> None:
    model, batch = made(CHAINS["plain"])
    theory = dh.theory.jacobian_norms(model, batch, points=["projection", "blocks.*"])
    found = growth(model, batch)
    assert found["rho sample"] == pytest.approx(theory.edges[:-1, :-1].max(), rel=1e-9)
    assert found["lambda"] == pytest.approx(theory.exponents[0, -2].mean(), rel=1e-9)


def test_bound_counts_pairs_and_samples() -> None:
    model, batch = made(CHAINS["spectral"])
    with torch.no_grad():
        model.head.weight.mul_(0.5)  # the head is not normalized
    found = bound(model, batch)
    assert found["rate"] <= 1.0
    assert (found["applies"], found["holds"]) == (1.0, 1.0)
    assert found["slack"] >= 1.0
    wide, batch = made(CHAINS["plain"])
    assert bound(wide, batch)["applies"] < 1.0


def test_curvature_of_all_activations() -> None:
    model, batch = made(lambda: plain_mlp(2, 5, 4, "softplus", inputs=7))
    inputs: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for module in model.modules()
        if isinstance(module, nn.Softplus)
    ]
    model(batch[0])
    for handle in handles:
        handle.remove()
    z = torch.cat([x.flatten() for x in inputs])
    s = torch.sigmoid(z)
    assert len(inputs) == 3
    assert curvature(model, batch)["curvature"] == pytest.approx(float((s * (1 - s)).pow(2).mean()), rel=1e-9)


def test_pair_gap_of_attention() -> None:
    torch.manual_seed(0)
    model = ToyAttention(4).double()
    batch = torch.randn(3, 5, 4).double(), torch.randn(3).double()
    dense = truth(model, batch, ["q", "k"])
    found = exp5.measure(model, batch, ("q", "k"))
    for name, part in (("full", "full"), ("GN", "gn"), ("T", "tensor")):
        assert found[name] == pytest.approx(float(dense[part]["q", "k"].norm()), rel=1e-9)
    assert found["gap"] == pytest.approx(found["T"] / found["GN"], rel=1e-12)
    assert pair_gap(exact_map(model, batch, ["q", "k"]), "k", "q") == pytest.approx(found)


@pytest.mark.parametrize("merge", ["sum", "cat"])
def test_diamond(merge: str) -> None:
    model, batch = made(lambda: DiamondMLP(2, merge, "silu", 3, 4, 7))
    names = ["a.0", "a.1", "b.0", "b.1"]
    dense, found = truth(model, batch, names), exp4.measure(model, batch)
    norm = {pair: float(block.norm()) for pair, block in dense["full"].items()}
    expected = {
        "A 0": [("a.0", "a.0"), ("a.1", "a.1")],
        "A 1": [("a.0", "a.1")],
        "B 0": [("b.0", "b.0"), ("b.1", "b.1")],
        "B 1": [("b.0", "b.1")],
        "cross 2": [("a.1", "b.1")],
        "cross 3": [("a.0", "b.1"), ("a.1", "b.0")],
        "cross 4": [("a.0", "b.0")],
    }
    for name, pairs in expected.items():
        assert found[name] == pytest.approx(np.mean([norm[pair] for pair in pairs]), rel=1e-9)
    gap = [float(dense[part]["a.1", "b.1"].norm()) for part in ("tensor", "gn")]
    assert found["T"] == pytest.approx(gap[0], rel=1e-9, abs=1e-15)
    assert found["GN"] == pytest.approx(gap[1], rel=1e-9)
    assert (found["gap"] == 0.0) == (merge == "sum")
    a, largest = model.stem(batch[0]), []
    outs = []
    for branch in (model.a, model.b):
        h = a
        for block in branch:
            largest.append(
                float(torch.stack([torch.linalg.norm(torch.func.jacrev(block)(row), 2) for row in h]).mean())
            )
            h = block(h)
        outs.append(h)
    joined = torch.cat(outs, -1)
    if merge == "cat":
        jacobians = torch.stack([torch.func.jacrev(model.merge)(row) for row in joined])
        largest.append(float(torch.linalg.matrix_norm(jacobians, 2).mean()))
    else:
        largest.append(0.5**0.5)
    assert found["rho"] == pytest.approx(max(largest), rel=1e-9)
    assert found["rho mean"] == pytest.approx(np.mean(largest), rel=1e-9)


def test_far_pairs_are_on_both_sides_of_the_narrow_block() -> None:
    model, batch = made(lambda: bottleneck_mlp(5, 6, 2, 4, 7))
    names = [f"blocks.{k}" for k in range(5)]
    dense, found = truth(model, batch, names)["full"], exp2.far(model, batch)
    assert model.blocks[2].linear.out_features == 2
    pairs = [(v, w) for v in names[:2] for w in names[3:]]
    norm = {pair: float(block.norm()) for pair, block in dense.items()}
    ranks = [(norm[pair] / float(torch.linalg.matrix_norm(dense[pair], 2))) ** 2 for pair in pairs]
    assert found["R far"] == pytest.approx(np.mean([norm[pair] for pair in pairs]), rel=1e-9)
    assert found["D far"] == pytest.approx(np.mean(ranks), rel=1e-9)
    assert found["D most"] == pytest.approx(max(ranks), rel=1e-9)
    coupling = [norm[v, w] / math.sqrt(norm[v, v] * norm[w, w]) for v, w in pairs]
    assert found["C far"] == pytest.approx(np.mean(coupling), rel=1e-9)


def test_resnet_measures_lie_within_their_standard_errors() -> None:
    torch.manual_seed(0)
    model = resnet18(10, nn.SiLU, width=8).eval()
    batch = torch.randn(2, 3, 32, 32), torch.tensor([1, 7])
    found, exact = exp6.measure(model, batch), gaps(exact_map(model, batch, exp6.POINTS))
    assert 0 < found["error"] < 0.5
    assert found["T 4"] == exact["T 4"] == 0.0
    assert found["GN 0"] == pytest.approx(exact["GN 0"], rel=1e-4)
    for d in range(4):
        assert found[f"T {d}"] == pytest.approx(exact[f"T {d}"], rel=4 * found["error"])


def test_blocks_that_a_power_iteration_takes_for_zero_do_not_count() -> None:
    model, batch = made(CHAINS["plain"])
    report = exact_map(model, batch, "blocks.*")
    all_ranks = resonance(report)
    found = exp6.counted_ranks(report)
    assert found == pytest.approx(
        {k: v for d in range(4) for k, v in ((f"D {d}", all_ranks[f"D {d}"]), (f"D all {d}", all_ranks[f"D {d}"]))}
    )
    scale = np.full((4, 4), 1e-8)
    scale[0, 1] = 1.0
    faint = replace(report, values={**report.values, "resonance": report.resonance * scale})
    found = exp6.counted_ranks(faint)
    assert found["D 1"] == pytest.approx(report.stable_rank[0, 1])
    assert math.isnan(found["D 2"])
    assert found["D all 2"] == pytest.approx(all_ranks["D 2"])


def test_plain_resnets_have_the_weights_of_residual_ones() -> None:
    pair = []
    for skip in (True, False):
        torch.manual_seed(3)
        pair.append(exp6.network("relu", skip, 4).eval())
    own, with_skips = pair[1].state_dict(), pair[0].state_dict()
    assert all(torch.equal(value, with_skips[name]) for name, value in own.items())
    assert {name for name in with_skips if name not in own} == {name for name in with_skips if "downsample" in name}
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    bare = resnet18(skip=False, width=4).eval()
    bare.load_state_dict(own)
    assert torch.equal(pair[1](x), bare(x))


def test_estimated_ranks_of_known_blocks() -> None:
    g = torch.Generator().manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(20, 20, generator=g, dtype=torch.float64))
    flat = ablation.estimated_ranks(u[:, :6] @ u[:6], 400)
    assert float(flat.mean()) == pytest.approx(6.0, rel=0.05)
    one = ablation.estimated_ranks(torch.outer(u[0], u[1]), 400)
    assert float(one.mean()) == pytest.approx(1.0, rel=0.1)
    assert 0.3 < float((one < 1).double().mean()) < 0.8  # exactly 1, so that noise is below it as often as above


def test_ablation_states_what_draws_show() -> None:
    model, batch = made(lambda: plain_mlp(3, 6, 4, "gelu", norm=False, inputs=7))
    found = ablation.measure(model, batch)
    exact = gaps(exact_map(model, batch, "blocks.*"))["gap"]
    assert found["gap exact"] == exact
    assert found["excess"] == pytest.approx(100 * (found["gap probes"] / exact - 1))
    assert abs(found["excess"]) < 4 * found["spread"] / math.sqrt(ablation.DRAWS)
    assert 0.6 < found["z"] < 1.6


def test_jacobians_pass_by_other_points() -> None:
    model, batch = made(CHAINS["residual"])
    names = ["projection", "blocks.0", "blocks.1"]
    steps = [("projection", "blocks.1"), ("blocks.0", "blocks.1")]
    whole, last = step_jacobians(model, batch, steps, names)
    h = model.projection(batch[0])
    both = torch.func.jacrev(lambda row: model.blocks[1](model.blocks[0](row)))
    assert torch.allclose(whole, torch.stack([both(row) for row in h]), rtol=1e-10)
    one = torch.func.jacrev(model.blocks[1])
    assert torch.allclose(last, torch.stack([one(row) for row in model.blocks[0](h)]), rtol=1e-10)
