"""The experiments beyond the paper: measurements against dense double-backward, claims on made-up cells, and small runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag_hesse.cli import main
from dag_hesse.experiments import growth, page, phi, scales, skips
from dag_hesse.experiments.command import BEYOND, load
from dag_hesse.experiments.gpt import GPT, repeats
from dag_hesse.experiments.measure import exact_map
from dag_hesse.experiments.protocol import Findings
from dag_hesse.experiments.results import Published, Results
from dag_hesse.experiments.skipped import DenseNet, UNet, noisy
from dag_hesse.experiments.training import evaluated
from dag_hesse.theory.point_graph import point_graph
from dag_hesse.theory.scene import pose
from tests.oracle import Truth

CLOSE = {"rel": 1e-9, "abs": 1e-16}
Batch = tuple[Tensor, Tensor]


def parameters(model: nn.Module, batch: Batch, names: list[str]) -> dict[str, np.ndarray]:
    """Norms of all blocks of parameters, by part, dense."""
    x, y = batch
    loss = F.mse_loss if y.is_floating_point() else F.cross_entropy
    dense = Truth(model, lambda: loss(model(x), y), [], names)
    parts = ("full", "gn", "tensor")
    return {p: np.array([[float(dense.block(v, w, p, "shared").norm()) for w in names] for v in names]) for p in parts}


@pytest.mark.parametrize("norm", [False, True])
def test_norms_and_exponents_of_attention(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "SCALES", (0.2, 0.6, 2.0))
    monkeypatch.setattr(scales, "RANGES", {"some": (0.2, 0.6)})
    torch.manual_seed(2)
    model = scales.Layer(norm).double()
    x, y = torch.randn(2, 3, scales.TOKENS, scales.WIDTH, dtype=torch.float64)
    found = scales.exponents(model, (x, y))
    names = [f"attention.{letter}_proj.weight" for letter in "qkv"]
    dense = {s: parameters(model, (s * x, y), names) for s in scales.SCALES}
    for part, key in (("GN", "gn"), ("T", "tensor")):
        for (i, v), (j, w) in itertools.product(enumerate("QKV"), enumerate("QKV")):
            own = {s: float(each[key][i, j]) for s, each in dense.items()}
            for s, norm_ in own.items():
                assert found[f"{part} {v}{w} @{s:.3g}"] == pytest.approx(norm_, rel=1e-8, abs=1e-14)
            if part == "T" and v == w == "V":
                assert {found[f"T VV @{s:.3g}"] for s in own} == {0.0}
                assert math.isnan(found["T VV some"])
                report = exact_map(model, (x, y), [names[2]], space="parameter")
                assert report.method["tensor_norm"].item() == "zero"
            else:
                expected = math.log(own[0.6] / own[0.2]) / math.log(3)
                assert found[f"{part} {v}{w} some"] == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_slopes() -> None:
    places = (0.1, 1.0, 10.0, 100.0)
    values = np.array([1e-5, 2.0, 2e3, 2e6])
    assert scales.slope(places, values, (1.0, 100.0)) == pytest.approx(3.0)
    assert scales.slope(places, values, (0.1, 1.0)) == pytest.approx(math.log10(2e5))
    assert math.isnan(scales.slope(places, values * [1, 0, 1, 1], (0.1, 10.0)))


def test_counting_gives_what_small_scales_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "SCALES", (1e-4, 1e-3))
    monkeypatch.setattr(scales, "RANGES", {"small": (1e-4, 1e-3)})
    torch.manual_seed(5)
    found = scales.exponents(scales.Layer(False), (torch.randn(2, 6, 8), torch.randn(2, 6, 8)))
    for part, block in itertools.product(scales.PARTS, scales.BLOCKS):
        expected = scales.counted(part, block)
        assert (expected is None) == ((part, block) == ("T", "VV"))
        if expected is not None:
            assert found[f"{part} {block} small"] == pytest.approx(expected, abs=0.02)


def test_gaps_of_heads() -> None:
    torch.manual_seed(0)
    model = GPT(width=6, heads=3, layers=2, vocabulary=5, tokens=4).double()
    for p in model.parameters():  # scores that are not small
        p.data += 0.4 * torch.randn_like(p)
    x, y = repeats(tokens=4, vocabulary=5).test.batch(slice(0, 2))
    found = scales.head_gaps(model, (x, y))
    names = [f"h.{layer}.attn.{letter}_proj" for layer in (0, 1) for letter in "qk"]
    dense = Truth(model, lambda: F.cross_entropy(model(x), y), names)
    assert len(found) == 2 * 3 * 4
    for layer, head in itertools.product(range(2), range(3)):
        pair = [f"h.{layer}.attn.{letter}_proj" for letter in "qk"]
        own = {
            part: float(dense.block(*pair, part, "shared").reshape(4, 3, 2, 4, 3, 2)[:, head, :, :, head].norm())
            for part in ("gn", "tensor")
        }
        assert found[f"GN {layer}.{head}"] == pytest.approx(own["gn"], rel=1e-8)
        assert found[f"T {layer}.{head}"] == pytest.approx(own["tensor"], rel=1e-8)
        assert found[f"gap {layer}.{head}"] == pytest.approx(own["tensor"] / own["gn"], rel=1e-8)


def test_the_gpt_is_causal_and_its_data_repeat() -> None:
    torch.manual_seed(0)
    model, data = GPT(8, 2, 1).double(), repeats()
    x, y = data.test.batch(slice(0, 3))
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(y[:, 8:], x[:, :8])
    later = x.clone()
    later[:, 10:] = (later[:, 10:] + 1) % 16
    before, after = model(x), model(later)
    assert torch.equal(before[..., :10], after[..., :10])
    assert not torch.allclose(before[..., 10:], after[..., 10:])
    assert 0 <= evaluated(model.float(), data.test)["accuracy"] <= 1


def convolutional(activation: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), activation(), nn.Conv2d(2, 2, 2), activation(), nn.Flatten(), nn.Linear(8, 3),
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["relu", "gelu", "gpt"])
def test_phi_of_dense_blocks(kind: str) -> None:
    if kind == "gpt":
        torch.manual_seed(3)
        model: nn.Module = GPT(4, 2, 1, vocabulary=3, tokens=3).double()
        batch = repeats(tokens=3, vocabulary=3).test.batch(slice(0, 2))
        assert len(phi.weights(model)) == 7
    else:
        model = convolutional({"relu": nn.ReLU, "gelu": nn.GELU}[kind])
        batch = torch.randn(4, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
        assert phi.weights(model) == ["0.weight", "3.weight", "6.weight"]
    norms = parameters(model, batch, phi.weights(model))
    found = phi.measure(model, batch)
    whole, diagonal = (norms["full"] ** 2).sum(), np.eye(len(norms["full"]), dtype=bool)
    assert found["phi"] == pytest.approx((norms["full"] ** 2)[~diagonal].sum() / whole, rel=1e-9)
    assert found["kept"] == pytest.approx((norms["full"] ** 2)[diagonal].sum() / whole, rel=1e-9)
    gn = norms["gn"] ** 2
    assert found["phi GN"] == pytest.approx(gn[~diagonal].sum() / gn.sum(), rel=1e-9)
    assert found["kept GN"] == pytest.approx(gn[diagonal].sum() / gn.sum(), rel=1e-9)
    tensor = norms["tensor"] ** 2
    assert found["T on"] == pytest.approx(tensor[diagonal].sum() / whole, rel=1e-9, abs=1e-25)
    assert found["T off"] == pytest.approx(tensor[~diagonal].sum() / whole, rel=1e-9)
    assert found["blocks"] == len(norms["full"])
    assert (found["T on"] == 0.0) == (kind == "relu")


def test_estimates_of_phi() -> None:
    model = convolutional(nn.GELU)
    batch = torch.randn(4, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    exact, found = phi.measure(model, batch), phi.measure(model, batch, "probes")
    assert "error" not in exact
    assert 0 < found["error"] < 0.5
    assert found["phi"] == pytest.approx(exact["phi"], abs=4 * found["error"] * exact["kept"])


def test_resnets_without_skips_have_the_same_weights() -> None:
    pair = []
    for kind in phi.KINDS:
        torch.manual_seed(4)
        pair.append(phi.network(kind, 2, 7).eval())
    residual, plain = (model.state_dict() for model in pair)
    assert phi.weights(pair[0]) == phi.weights(pair[1])
    assert len(phi.weights(pair[0])) == 18
    assert all(torch.equal(plain[name], residual[name]) for name in phi.weights(pair[0]))
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(pair[0](x), pair[1](x))


class CutDense(DenseNet):
    """Lets no derivative through from one layer to another, past the chain."""

    cut: tuple[str, str] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self._cut_block("block1", "stem", "transition", self.stem(x)), 2)
        return self.head(self._cut_block("block2", "transition", None, x).mean((2, 3)))

    def _cut_block(self, name: str, first: str, last: str | None, x: Tensor) -> Tensor:
        parts = {first: x}

        def taken(target: str) -> Tensor:
            own = [v.detach() if self.cut == (k, target) else v for k, v in parts.items()]
            return torch.cat(own, 1)

        for k, layer in enumerate(getattr(self, name)):
            parts[f"{name}.{k}"] = layer(taken(f"{name}.{k}"))
        return self.transition(taken(last)) if last else torch.cat(list(parts.values()), 1)


class CutUNet(UNet):
    """The same."""

    cut: tuple[str, str] | None = None

    def forward(self, x: Tensor) -> Tensor:
        first = self.down[0](x)
        second = self.down[1](F.avg_pool2d(first, 2))
        x = F.interpolate(self.middle(F.avg_pool2d(second, 2)), scale_factor=2.0)
        x = self.up[1](torch.cat([x, second.detach() if self.cut == ("down.1", "up.1") else second], 1))
        x = F.interpolate(x, scale_factor=2.0)
        return self.head(self.up[0](torch.cat([x, first.detach() if self.cut == ("down.0", "up.0") else first], 1)))


def small(kind: str) -> tuple[nn.Module, nn.Module, Batch]:
    torch.manual_seed(6)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64)
    if kind == "densenet":
        model, cut = DenseNet(layers=2, growth=1, classes=3), CutDense(layers=2, growth=1, classes=3)
        y = torch.tensor([0, 2])
    else:
        model, cut = UNet(width=2, levels=2), CutUNet(width=2, levels=2)
        y = torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64)
    cut.load_state_dict(model.state_dict())
    return model.double(), cut.double(), (x, y)


def blocks(model: nn.Module, batch: Batch, part: str = "full") -> dict[tuple[str, str], Tensor]:
    x, y = batch
    loss = F.mse_loss if y.is_floating_point() else F.cross_entropy
    dense = Truth(model, lambda: loss(model(x), y), model.chain)
    return {pair: dense.block(*pair, part, "shared") for pair in itertools.product(model.chain, model.chain)}


@pytest.mark.parametrize("kind", ["densenet", "unet"])
def test_coupling_across_skips(kind: str) -> None:
    model, cut, batch = small(kind)
    assert torch.allclose(model(batch[0]), cut(batch[0]), rtol=1e-12)
    found, dense = skips.measure(model, batch), blocks(model, batch)
    chain, norm = model.chain, {pair: float(block.norm()) for pair, block in dense.items()}
    assert found["T"] == 0.0
    assert found["R sum"] == pytest.approx(sum(norm[v, w] for v, w in itertools.combinations(chain, 2)), **CLOSE)
    shares: dict[int, list[float]] = {}
    for v, w in model.skips:
        cut.cut = (v, w)
        block = dense[v, w]
        without = blocks(cut, batch, "gn")[v, w]
        shares.setdefault(chain.index(w) - chain.index(v), []).append(float((block - without).norm() / block.norm()))
    assert {f"carried {d}" for d in shares} == {name for name in found if name.startswith("carried")}
    for d, own in shares.items():
        assert found[f"carried {d}"] == pytest.approx(np.mean(own), rel=1e-8)
    for kind_, d in itertools.product(("skip", "none"), range(2, len(chain))):
        pairs = [p for p in itertools.combinations(chain, 2) if chain.index(p[1]) - chain.index(p[0]) == d]
        pairs = [p for p in pairs if (p in model.skips) == (kind_ == "skip")]
        assert bool(pairs) == (f"C {kind_} {d}" in found)
        if pairs:
            r, c = np.mean([[norm[v, w], norm[v, w] / math.sqrt(norm[v, v] * norm[w, w])] for v, w in pairs], axis=0)
            assert found[f"R {kind_} {d}"] == pytest.approx(r, **CLOSE)
            assert found[f"C {kind_} {d}"] == pytest.approx(c, **CLOSE)


@pytest.mark.parametrize("build", [DenseNet, UNet])
@pytest.mark.parametrize("skip", [True, False])
def test_skips_are_the_edges_that_leave_the_chain(build: Callable[..., nn.Module], skip: bool) -> None:
    model = build(skip).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    y = torch.zeros_like(x) if build is UNet else torch.tensor([0, 1])
    names = {name: k for k, name in enumerate(model.chain)}
    graph = point_graph(pose(model, (x, y), points=model.chain).graph)
    edges = [tuple(graph.names[k] for k in edge) for edge in graph.edges]
    inside = [edge for edge in edges if set(edge) <= set(names)]
    assert {edge for edge in inside if names[edge[1]] - names[edge[0]] > 1} == (set(model.skips) if skip else set())
    assert {(a, b) for a, b in inside if names[b] - names[a] == 1} == set(itertools.pairwise(model.chain))


def test_noise_is_on_the_inputs_alone() -> None:
    data = noisy()
    x, y = data.test.batch(slice(0, 50))
    assert x.shape == y.shape == (50, 1, 8, 8)
    assert float((x - y).std()) == pytest.approx(0.5, rel=0.05)


def made_up(name: str, cells: dict[tuple[str, str], dict[str, float]]) -> Findings:
    header = {"experiment": name, "protocol": "quick", "data": {"name": "none", "note": "", "digest": ""}}
    rows = {(case, 1, when): {"values": v, "seconds": {}, "epoch": 0} for (case, when), v in cells.items()}
    return Findings(Results(header, rows), Published.of(name))


@pytest.mark.parametrize("exponent, holds", [(5.4, True), (5.6, False)])
def test_claims_about_exponents(exponent: float, holds: bool) -> None:
    values = {f"GN {block} small": float(scales.counted("GN", block) or 0) for block in scales.BLOCKS}
    values |= {f"T {block} small": float(scales.counted("T", block) or 0) for block in scales.BLOCKS if block != "VV"}
    values |= {"T QQ small": exponent, "T VV @1": 0.0 if holds else 1e-30}
    found = growth.claims(made_up("growth", {("plain", "init"): values}))
    assert [found[0].holds, found[1].holds] == [holds, None]
    assert found[3].holds is holds
    after = {"gap 0.0": 0.5 if holds else 4.0}
    with_heads = growth.claims(made_up("growth", {("gpt", "init"): {"gap 0.0": 3.0}, ("gpt", "final"): after}))
    assert [claim.holds for claim in with_heads[-3:]] == [True, not holds, holds]


def test_claims_about_phi_and_skips_may_fail() -> None:
    cells = {
        (f"{kind}/{k}", "init"): {"phi GN": 0.5 - 0.001 * k, "phi": p, "T on": 0.0}
        for k in phi.CLASSES
        for kind, p in (("residual", 0.6), ("plain", 0.7))
    }
    assert [claim.holds for claim in phi.claims(made_up("phi", cells))] == [False, False, True, True, True]
    cells["plain/30", "init"] |= {"phi GN": 0.9, "T on": 1e-9}
    assert [claim.holds for claim in phi.claims(made_up("phi", cells))] == [False, False, False, True, False]
    own = {"C skip 2": 0.9, "C none 2": 0.5, "R skip 2": 0.1, "R none 2": 0.2, "R sum": 1.0}
    plain = {"C skip 2": 0.8, "C none 2": 0.5, "R skip 2": 0.3, "R none 2": 0.2, "R sum": 2.0}
    found = skips.claims(made_up("skips", {("densenet/skips", "init"): own, ("densenet/chain", "init"): plain}))
    assert [claim.holds for claim in found[:5]] == [False, True, False, True, False]
    assert {claim.holds for claim in found[5:]} == {None}


@pytest.mark.parametrize("name", BEYOND)
def test_from_end_to_end(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, key, value in (
        (growth, "GPT_WIDTH", 8), (growth, "HEADS", 2), (growth, "LAYERS", 1), (phi, "QUICK_WIDTH", 1), (phi, "QUICK_LADDER", (4,)),
        (skips, "QUICK_EPOCHS", 1),
    ):  # fmt: skip
        monkeypatch.setattr(module, key, value)
    cases = {"phi": ["*/10", "gpt/4"], "skips": ["unet/*"]}.get(name, ["*"])
    assert main(["experiment", name, "--seeds", "42", "--out", str(tmp_path), "--cases", *cases]) == 0
    printed = capsys.readouterr().out
    assert "[yes]" in printed
    assert "Quick run, not the full protocol" in printed
    tables = (tmp_path / name / "tables.md").read_text(encoding="utf-8")
    assert "| found |" in tables
    assert ("by counting" in tables) == (name == "growth")
    assert "deviation" not in tables
    assert (tmp_path / name / f"{name}.png").stat().st_size > 1000
    results = Results.read(tmp_path / name / "results.json")
    assert page.as_report(load(name), results) in printed
    assert not Published.of(name).source


def test_exact_maps_say_so() -> None:
    model, _, batch = small("unet")
    assert set(exact_map(model, batch, model.chain).method["resonance"].ravel()) <= {"exact", "gram", "zero"}
