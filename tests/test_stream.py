"""Loaders: held, or iterated again in every pass and compared with the first one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dag_hesse as dh
from dag_hesse import errors
from dag_hesse._capture import Batches
from dag_hesse.budget import Budget
from dag_hesse.experiments.models import mlp
from dag_hesse.plan import fuse, plan
from dag_hesse.plan.memory import linearization_bytes, sweep_bytes
from dag_hesse.sweep import Problem

SMALL = 100  # bytes: a quarter of it is less than a batch takes


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _data(samples: int = 10) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(samples, 3).double(), torch.arange(samples) % 2)


class Passes:
    """An iterable that gives other batches in every pass, or the last ones once its script is through."""

    def __init__(self, *script: list[tuple[Tensor, Tensor]]) -> None:
        self.script, self.passes = script, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(self.script[min(self.passes, len(self.script)) - 1])


def _batches(samples: int = 10) -> list[tuple[Tensor, Tensor]]:
    x, y = _data(samples).tensors
    return list(zip(x.split(4), y.split(4), strict=True))


def _whole(samples: int = 10) -> tuple[Tensor, Tensor]:
    return _data(samples).tensors


@pytest.mark.parametrize("memory", [None, SMALL])
@pytest.mark.parametrize("space", ["parameter", "activation"])
def test_an_operator_over_a_loader_is_the_one_over_all_its_samples(memory: int | None, space: str) -> None:
    model, loader = _net(), DataLoader(_data(), batch_size=4)
    H = dh.HessianOperator(model, loader, space=space, memory=memory)
    found = H @ torch.eye(H.shape[0]).double()  # dense() would not fit
    assert torch.allclose(found, dh.HessianOperator(model, _whole(), space=space).dense(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch_mode", ["shared", "per_sample"])
@pytest.mark.parametrize("space", ["parameter", "activation"])
def test_a_map_over_a_loader_that_is_read_again_is_the_one_over_all_its_samples(batch_mode: str, space: str) -> None:
    options: dict[str, Any] = {"batch_mode": batch_mode, "space": space, "mode": "probes"}
    loader = Passes(_batches())
    whole = dh.analyze(_net(), _whole(), **options)
    found = dh.analyze(_net(), loader, memory=SMALL, **options)
    assert loader.passes > 1
    assert found.facts["loss"] == pytest.approx(whole.facts["loss"], rel=1e-12)
    assert np.allclose(found.resonance, whole.resonance, rtol=1e-10)


def test_what_is_held_is_read_once_and_what_is_not_in_every_pass() -> None:
    for memory, passes in ((None, 1), (SMALL, 2)):
        loader = Passes(_batches())
        assert len(list(Batches(loader, memory))) == 3
        assert loader.passes == passes


@pytest.mark.parametrize("call", ["operator", "analyze"])
def test_a_quarter_of_memory_is_for_batches_whoever_asks(call: str) -> None:
    taken = sum(t.nbytes for batch in _batches() for t in batch)
    for memory, held in ((4 * taken, True), (4 * taken - 1, False)):
        loader, options = Passes(_batches()), {"memory": memory, "reduction": "sum", "verify": "none"}
        if call == "operator":
            dh.HessianOperator(_net(), loader, **options).trace(2)
        else:
            dh.analyze(_net(), loader, **options)
        assert (loader.passes == 1) is held


def test_half_of_memory_is_for_sweeps_whoever_asks() -> None:
    model, batch = mlp([3, 40, 40, 3], nn.SiLU), (torch.randn(6, 3), torch.arange(6) % 3)
    graph = fuse(dh.capture(model, batch))
    sites = [k for point in graph.points for k in point.sites]
    both, size = sweep_bytes(graph, sites, sites, 2), sweep_bytes(graph, sites, sites)
    structure = dh.structure(graph)
    assert [plan([structure], memory=2 * k * both).chunk for k in (1, 3)] == [1, 3]
    # An operator's vectors, which come and go, have as much of it as its sweeps.
    chunks = [dh.HessianOperator(model, batch, space="activation", memory=4 * k * size).chunk for k in (1, 3)]
    assert chunks == [1, 3]


def test_linearizations_are_kept_in_a_quarter_of_memory() -> None:
    graph = fuse(dh.capture(_net(), _batches()[0], space="parameter"))
    sites = [k for point in graph.points for k in point.sites]
    size = linearization_bytes(graph, sites)
    for memory, kept in ((12 * size, 3), (12 * size - 1, 2), (8 * size, 2), (4 * size, 1), (4 * size - 1, 0)):
        problem = Problem(_net(), [graph] * 3, Batches(_batches(12)), "shared", with_out=False, memory=memory)
        first, second = ([lin for _, lin in problem.linearizations()] for _ in range(2))
        assert sum(a is b for a, b in zip(first, second, strict=True)) == kept


def test_products_of_linearizations_that_are_kept_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "keeps", lambda *asked: True)
    loader = Passes(_batches())
    H = dh.HessianOperator(_net(), loader, memory=SMALL, reduction="mean")
    v = torch.ones(H.shape[0]).double()
    first = H @ v
    assert loader.passes == 2
    assert torch.equal(H @ v, first)
    assert loader.passes == 2
    H.refresh()
    assert torch.equal(H @ v, first)
    assert loader.passes == 3


def test_without_room_for_linearizations_every_product_iterates_the_loader() -> None:
    loader = Passes(_batches())
    H = dh.HessianOperator(_net(), loader, memory=SMALL, reduction="mean")
    v = torch.ones(H.shape[0]).double()
    assert torch.equal(H @ v, H @ v)
    assert loader.passes == 3


@pytest.mark.parametrize("draw", ["sampler", "augmentation"])
def test_a_loader_that_draws_from_the_global_generators_repeats_itself(
    draw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = _net(), _data()

    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
            x, y = data[k]
            return x + torch.randn(3) + float(np.random.rand()), y

    loader = DataLoader(data if draw == "sampler" else Noisy(), batch_size=4, shuffle=draw == "sampler")
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "batches", 0)
        streamed = dh.HessianOperator(model, loader)
    first = streamed.dense()
    streamed.refresh()
    assert torch.equal(streamed.dense(), first)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
    held = dh.HessianOperator(model, loader)  # the same draws once more
    assert torch.equal(held.dense(), first)


def _changed(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    x, y = batches[1]
    return [batches[0], (x, 1 - y), batches[2]]


CHANGES = {
    "order": (lambda b: [b[0], b[2], b[1]], r"its 2\. batch is what the 3\. was"),
    "content": (_changed, r"its 2\. batch has other content"),
    "end": (lambda b: b[:2], "ended after 2 batches; it gave 3"),
    "used up": (lambda b: [], "ended after 0 batches; it gave 3"),
    "growth": (lambda b: [*b, b[0]], "more than the 3 batches"),
    "split": (lambda b: [(b[0][0][:2], b[0][1][:2]), *b[1:]], r"its 1\. batch has other content"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_loader_that_changes_is_named(change: str) -> None:
    turn, message = CHANGES[change]
    loader = Passes(_batches(), turn(_batches()))
    H = dh.HessianOperator(_net(), loader, memory=SMALL, reduction="mean")
    with pytest.raises(errors.UnstableLoaderError, match=rf"{message}.*shuffle=False"):
        H @ torch.ones(H.shape[0]).double()
    held = dh.HessianOperator(_net(), Passes(_batches(), turn(_batches())))  # what is held cannot change
    assert torch.allclose(held.dense(), dh.HessianOperator(_net(), _whole()).dense(), rtol=1e-12, atol=1e-14)


def test_a_loader_with_a_generator_of_its_own_is_named_when_it_shuffles() -> None:
    loader = DataLoader(_data(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(errors.UnstableLoaderError, match="changes from pass to pass"):
        dh.HessianOperator(_net(), loader, memory=SMALL)  # weights of batches are found in a second pass
    H = dh.HessianOperator(_net(), loader, memory=SMALL, reduction="mean")
    with pytest.raises(errors.UnstableLoaderError, match="changes from pass to pass"):
        H @ torch.ones(H.shape[0]).double()


def test_an_iterator_that_cannot_be_held_is_refused() -> None:
    with pytest.raises(errors.MemoryBudgetError, match="iterated once only"):
        dh.HessianOperator(_net(), iter(_batches()), memory=SMALL)
    with pytest.raises(errors.OptionError, match="positive number of bytes"):
        dh.HessianOperator(_net(), _batches(), memory=-1)
    with pytest.raises(errors.BatchError, match="empty or used up"):
        dh.HessianOperator(_net(), iter([]))
    with pytest.raises(errors.BatchError, match="empty or used up"):
        dh.profile(_net(), iter([]))


def test_a_profile_takes_the_first_batch_alone() -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield _batches()[0]
        raise AssertionError("a second batch was asked for")

    assert "sweep" in dh.profile(_net(), batches()).phases


def _digits(activation: type[nn.Module]) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), activation(), nn.Linear(12, 9), activation(), nn.Linear(9, 4)).double()
    x, y = torch.randn(100, 8).double(), torch.randint(0, 4, (100,))
    return model, list(zip(x.split(16), y.split(16), strict=True))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize(
    "loss", [None, lambda o, t: (o.sin() * F.one_hot(t, 4)).sum(1).mean()], ids=["convex", "indefinite"]
)
def test_the_gram_route_over_many_batches_adds_blocks(activation: type[nn.Module], loss: Any) -> None:
    model, batches = _digits(activation)
    exact = dh.analyze(model, batches, loss=loss, mode="exact")
    for height in (None, 0):  # blocks, and Gram matrices
        with pytest.MonkeyPatch.context() as patch:
            if height is not None:
                patch.setattr("dag_hesse.estimate.gram.gram_in_blocks", lambda rows, dims: False)
            found = dh.analyze(model, batches, loss=loss, mode="gram")
        assert (found.method["gn_norm"] == "gram").all()
        for name in ("gn_norm", "resonance", "stable_rank", "tensor_norm"):
            assert np.allclose(found.values[name], exact.values[name], rtol=1e-9), name


def test_probes_beside_blocks_of_many_batches() -> None:
    """Where dims are too large for identity probes, GN parts of products come from the blocks."""
    model, batches = _digits(nn.SiLU)
    exact = dh.analyze(model, batches, mode="exact")
    found = dh.analyze(model, batches, probes=4, mode="gram", rtol=0.1)
    assert set(found.method["gn_norm"].ravel()) == {"gram"}
    assert np.allclose(found.gn_norm, exact.gn_norm, rtol=1e-9)
    assert (found.stderr["resonance"] <= 0.1 * found.resonance + 1e-12).all()
    off = np.abs(found.resonance - exact.resonance)
    assert (off <= 4 * found.stderr["resonance"] + 1e-9 * exact.resonance).all()


class Forks(nn.Module):
    """Curved or not, as the batch's values are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return self.b(z.tanh() if x.sum() > 0 else z * 1.5)


@pytest.mark.filterwarnings("ignore:captured anew")
@pytest.mark.parametrize("order", [1, -1], ids=["curved first", "curved last"])
@pytest.mark.parametrize("batch_mode", ["shared", "per_sample"])
@pytest.mark.parametrize("last", [2, 3], ids=["one shape", "two shapes"])
def test_what_is_zero_is_zero_in_every_batch(last: int, batch_mode: str, order: int) -> None:
    count = 2 + last
    x, y = torch.randn(count, 3).double().abs(), torch.arange(count) % 2
    batches = [(x[:2], y[:2]), (-x[2:], y[2:])][::order]
    options: dict[str, Any] = {"points": ["a"], "mode": "exact", "batch_mode": batch_mode}
    found, apart = dh.analyze(Forks(), batches, **options), [dh.analyze(Forks(), b, **options) for b in batches]
    blocks = [report.block(0, 0, "tensor") for report in apart]
    if batch_mode == "per_sample":
        expected = torch.cat(blocks)
        assert found.tensor_norm[0, 0] == pytest.approx(float(expected.flatten(1).norm(dim=1).mean()), rel=1e-10)
    else:
        expected = sum(len(b[1]) / count * block for b, block in zip(batches, blocks, strict=True))
        assert found.tensor_norm[0, 0] == pytest.approx(float(expected.norm()), rel=1e-10)
    assert torch.allclose(found.block(0, 0, "tensor"), expected, rtol=1e-10, atol=1e-14)
    assert found.method["tensor_norm"][0, 0] == "exact"


def test_a_stream_is_planned_over_all_its_batches() -> None:
    model, batches = _digits(nn.SiLU)
    graph = dh.capture(model, batches[0])
    one, many = (plan([dh.structure(graph)], counts=[n]) for n in (1, 50))
    assert many.flops == pytest.approx(50 * one.flops, rel=0.2)
    x, y = torch.randn(3000, 8).double(), torch.randint(0, 4, (3000,))
    report = dh.analyze(model, list(zip(x.split(100), y.split(100), strict=True)))
    assert report.facts["seconds"]["estimate"] < 10  # a Gram matrix of 12,000 rows would take minutes
    assert set(report.method["resonance"].ravel()) <= {"gram", "exact"}
