"""Sweeps recorded at their second run and replayed; on the CPU by a recorder that runs them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.sweep import kept, replay
from dag_hesse.sweep.replay import Replayed, Results
from tests import device


class Recorder:
    """Runs what it recorded again, and writes over the results, as a CUDA graph does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.size = 0

    def __call__(self, run: Callable[[], Results], pool: Any) -> tuple[Callable[[], None], Results, int]:
        self.recorded += 1
        results = run()
        for one in results.values():
            one.data = one.data.clone()

        def again() -> None:
            self.replayed += 1
            for k, one in run().items():
                results[k].data.copy_(one.data)

        return again, results, self.size


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()
    monkeypatch.setattr(kept, "Linearization", Replayed)
    if device.NAME == "cpu":
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(Replayed, "record", staticmethod(made))
    yield made
    replay.refused.clear()


def problem() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 3)).double()
    return model.to(device.NAME), (torch.randn(7, 5).double().to(device.NAME), (torch.arange(7) % 3).to(device.NAME))


def test_every_sweep_gives_the_same_product_however_it_runs(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = problem()
    H = dh.HessianOperator(model, batch)
    vectors = torch.randn(6, H.shape[1], dtype=torch.float64, device=device.NAME)
    found = [H @ v for v in vectors]  # the first call by call, the second recorded, the rest replayed
    monkeypatch.setenv("DAG_HESSE_REPLAY", "0")
    plain = dh.HessianOperator(model, batch)
    for mine, v in zip(found, vectors, strict=True):
        torch.testing.assert_close(mine, plain @ v, rtol=1e-12, atol=1e-14)
    assert not replay.refused
    if device.NAME == "cpu":
        assert (recorder.recorded, recorder.replayed) == (1, 1 + 4)


@pytest.mark.skipif("device.NAME != 'cpu'", reason="what a recording holds is given by the recorder")
def test_what_recordings_hold_counts_as_memory(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = problem()
    for size, replayed in ((1 << 20, 5), (1 << 28, 0)):
        recorder.size, recorder.replayed = size, 0
        H = dh.HessianOperator(model, batch, memory=16 << 20)
        v = torch.randn(H.shape[1], dtype=torch.float64)
        expected = H @ v
        for _ in range(5):
            torch.testing.assert_close(H @ v, expected, rtol=1e-12, atol=1e-14)
        assert recorder.replayed == replayed, size
    (why,) = replay.refused
    assert "256 MiB" in why and "memory=" in why


def test_other_forms_and_new_parameters_are_recorded_anew(recorder: Recorder) -> None:
    model, batch = problem()
    H = dh.HessianOperator(model, batch)
    v = torch.randn(H.shape[1], 2, dtype=torch.float64, device=device.NAME)
    for _ in range(3):
        both, (gn, tensor) = H @ v, H.parts(v)
        torch.testing.assert_close(gn + tensor, both, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    H.refresh()
    anew = dh.HessianOperator(model, batch) @ v
    for _ in range(3):
        torch.testing.assert_close(H @ v, anew, rtol=1e-12, atol=1e-14)
    assert not replay.refused


def test_a_report_is_the_same(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = problem()
    options = {"mode": "probes", "probes": 64, "seed": 3}
    recorded = dh.analyze(model, batch, **options)
    monkeypatch.setenv("DAG_HESSE_REPLAY", "0")
    assert recorded.to_dataframe().equals(dh.analyze(model, batch, **options).to_dataframe())
    if device.NAME == "cpu":
        assert recorder.replayed


@pytest.mark.parametrize(
    ("fault", "told"),
    [(RuntimeError("operation not permitted when stream is capturing"), "not permitted"), (MemoryError(), "memory")],
)
def test_a_sweep_that_cannot_be_recorded_runs_as_before(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, fault: Exception, told: str
) -> None:
    def fails(run: Any, pool: Any) -> Any:
        raise fault

    monkeypatch.setattr(Replayed, "record", staticmethod(fails))
    model, batch = problem()
    report = dh.analyze(model, batch, mode="probes", probes=64)
    (why,) = report.facts["not recorded"]
    assert told in why and why in str(report)


def test_a_recording_that_gives_something_else_is_not_used(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(run: Any, pool: Any) -> Any:
        results = run()
        for one in results.values():
            one.data = one.data * 1.01
        return lambda: None, results, 0

    monkeypatch.setattr(Replayed, "record", staticmethod(wrong))
    model, batch = problem()
    H = dh.HessianOperator(model, batch)
    v = torch.randn(H.shape[1], dtype=torch.float64, device=device.NAME)
    first = H @ v
    assert all(torch.equal(H @ v, first) for _ in range(3))
    assert any("is off by 1.0e-02" in why for why in replay.refused)
