"""Predicted memory: what a linearization keeps, and the peak of a sweep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dag_hesse as dh
from bench.timing import peak_bytes
from dag_hesse._capture import Batches
from dag_hesse.errors import MemoryBudgetError
from dag_hesse.plan import fuse
from dag_hesse.plan.memory import kept_bytes, sweep_bytes
from dag_hesse.rules.footprint import tensors
from dag_hesse.sweep import Problem
from tests.models.zoo import CASES, case


def place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@pytest.mark.parametrize("name", sorted(CASES))
def test_linearizations_keep_what_is_predicted(name: str) -> None:
    one = case(name)
    points = [*one.names, *one.parameters]
    graph = fuse(dh.capture(one.model, one.batch, loss=one.loss, output=one.out or None, points=points))
    batches = Batches(one.batch)
    _, lin = next(iter(Problem(one.model, [graph], batches, "shared", with_out=False).linearizations()))
    given = [*one.model.parameters(), *one.model.buffers(), *batches.tensors, *graph.constants.values()]
    theirs = {place(x) for x in given}
    kept = {place(x): x.untyped_storage().nbytes() for x in tensors(list(lin.calls.values()))}
    found = sum(size for k, size in kept.items() if k not in theirs)
    predicted = kept_bytes(graph, [k for point in graph.points for k in point.sites])
    assert 0.98 * found <= predicted <= 1.2 * found  # a reshape that copies is taken for a view of a larger whole


SETUP = """
import torch, dag_hesse as dh
from torch import nn
layers = [layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.SiLU())]
model = nn.Sequential(*layers, nn.Linear(512, 10))
batch = (torch.randn(2048, 512), torch.arange(2048) % 10)
H = dh.HessianOperator(model, batch, loss=nn.functional.cross_entropy, space={space!r})
v = torch.randn(H.shape[0])
H @ v  # linearizes
H._problem.arena.retire()
"""


@pytest.mark.parametrize("space", ["activation", "parameter"])
def test_the_peak_of_a_sweep_is_predicted(space: str) -> None:
    code, found = SETUP.format(space=space), dict[str, Any]()
    exec(code, found)
    graph = fuse(dh.capture(found["model"], found["batch"], loss=nn.functional.cross_entropy, space=space))
    sites = [k for point in graph.points for k in point.sites]
    assert abs(sweep_bytes(graph, sites, sites) / peak_bytes(f"{code}run = lambda: H @ v") - 1) < 0.15


MAP = """
import torch, dag_hesse as dh
from torch import nn
torch.manual_seed(0)
layers = [layer for _ in range(6) for layer in (nn.Linear(512, 512), nn.SiLU())]
model = nn.Sequential(*layers, nn.Linear(512, 10))
batch = (torch.randn(8, 512), torch.arange(8) % 10)
dh.analyze(model, batch, space="parameter", mode="probes", probes=2, points=["12"])
def made(**options):
    return dh.analyze(model, batch, space="parameter", **options)
run = lambda: made({options})
"""
PROBED = "mode='probes', probes=32, memory='256MiB'"


def test_maps_of_large_points_keep_to_their_memory() -> None:
    """Products of 28 pairs of 263k rows with 32 probes take 1.1 GiB at once."""
    assert peak_bytes(MAP.format(options=PROBED)) < 256 << 20


def test_less_memory_gives_the_same_map() -> None:
    code, found = MAP.format(options=PROBED), dict[str, Any]()
    exec(code, found)
    tight, roomy = found["run"](), found["made"](mode="probes", probes=32)
    for norm in ("resonance", "gn_gap"):
        assert getattr(tight, norm) == pytest.approx(getattr(roomy, norm), rel=1e-4)
    assert abs(tight.stable_rank / roomy.stable_rank - 1).max() < 0.05


def test_gram_factors_keep_to_their_memory_or_are_refused() -> None:
    """80 rows of 1.6 million numbers: 0.5 GiB."""
    assert peak_bytes(MAP.format(options="mode='gram', pairs=[('0', '12')], memory='2GiB'")) < 2 << 30
    found = dict[str, Any]()
    exec(MAP.format(options="mode='gram', memory='256MiB'"), found)
    with pytest.raises(MemoryBudgetError, match=r"holds .*MiB .* 128\.0 MiB are allowed"):
        found["run"]()


def test_blocks_are_exact_where_they_have_room() -> None:
    found = dict[str, Any]()
    exec(MAP.format(options="probes=8, points=['2', '12.bias'], memory='128MiB'"), found)
    report = found["run"]()
    assert report.method["resonance"].tolist() == [["probes", "exact"], ["exact", "exact"]]
    scarce = found["made"](probes=8, points=["2", "12.bias"], memory="64MiB")
    assert scarce.method["resonance"].tolist() == [["probes", "probes"], ["probes", "probes"]]


def test_krylov_bases_have_room_or_are_refused() -> None:
    model, batch = nn.Linear(400, 10), (torch.randn(6, 400), torch.arange(6))
    roomy, tight, scarce = (dh.HessianOperator(model, batch, memory=size) for size in (None, "900 KB", "300 KB"))
    found = tight.spectral_density(20, num_repeats=3)  # one start after the other
    for x, y in zip(found, roomy.spectral_density(20, num_repeats=3), strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))
    assert tight.eigsh(1)[0] == pytest.approx(roomy.eigsh(1)[0], rel=1e-4)
    for refused in (lambda: scarce.eigsh(1), lambda: scarce.spectral_density(20), lambda: tight.eigsh(1, ncv=40)):
        with pytest.raises(MemoryBudgetError, match=r"Lanczos vectors.*take a smaller"):
            refused()


def test_spectra_of_blocks_have_room_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = nn.Linear(400, 10), (torch.randn(6, 400), torch.arange(6))
    options = {"points": ["weight"], "steps": 20}
    roomy = dh.theory.block_spectra(model, batch, **options)
    monkeypatch.setattr("dag_hesse.budget.available_memory", lambda device: 900_000)
    assert dh.theory.block_spectra(model, batch, **options).scale == pytest.approx(roomy.scale, rel=1e-4)
    monkeypatch.setattr("dag_hesse.budget.available_memory", lambda device: 300_000)
    with pytest.raises(MemoryBudgetError, match="steps="):
        dh.theory.block_spectra(model, batch, **options)
    with pytest.raises(MemoryBudgetError, match="take a smaller k="):
        dh.theory.negative_curvature(model, batch)
