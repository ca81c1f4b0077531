"""Fits on maps that are known: lines are recovered, intervals cover, radii count."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.errors import DependencyError, OptionError
from tests.theory.models import batch, chain


@pytest.fixture(scope="module")
def report() -> dh.CurvatureReport:
    torch.manual_seed(0)
    model = chain(depth=5)
    return dh.analyze(model, batch(), points=["1", "3", "5", "7", "9"], mode="exact")


def made(report: dh.CurvatureReport, resonance: np.ndarray) -> dh.CurvatureReport:
    return replace(report, values={**report.values, "resonance": resonance})


def test_an_exponential_is_recovered(report: dh.CurvatureReport) -> None:
    fit = dh.theory.decay_fit(made(report, 3.0 * np.exp(-0.7 * report.distance)))
    assert fit.slope == pytest.approx(-0.7) and fit.intercept == pytest.approx(np.log(3.0))
    assert fit.r_squared == pytest.approx(1.0) and fit.rate == pytest.approx(np.exp(-0.7))
    assert fit.pairs.tolist() == [5, 4, 3, 2, 1]
    np.testing.assert_allclose(fit.interval, -0.7)


def test_interval_covers_the_slope(report: dh.CurvatureReport) -> None:
    """Of noisy maps, 90 % intervals hold the true slope about as often as they say (few pairs: rather less)."""
    generator, covered = np.random.default_rng(0), 0
    distance = np.abs(np.subtract.outer(np.arange(12), np.arange(12)))
    many = replace(report, points=report.points[:1] * 12, distance=distance)
    for _ in range(100):
        noise = np.triu(generator.lognormal(0.0, 0.2, (12, 12)))
        resonance = np.exp(-0.5 * distance) * (noise + np.triu(noise, 1).T)
        fit = dh.theory.decay_fit(made(many, resonance), resamples=200, level=0.9)
        covered += fit.interval[0] <= -0.5 <= fit.interval[1]
    assert 55 <= covered <= 100


@pytest.mark.parametrize("metric", ["resonance", "coupling", "stable_rank"])
def test_means_of_a_model(report: dh.CurvatureReport, metric: str) -> None:
    fit = dh.theory.decay_fit(report, metric)
    values = report.values[metric]
    np.testing.assert_allclose(fit.mean, [values.diagonal(d).mean() for d in range(5)])
    assert f"R² = {fit.r_squared:.3f}" in str(fit)


def test_radius(report: dh.CurvatureReport) -> None:
    resonance = 10.0 ** (-2.0 * report.distance)
    assert dh.theory.interaction_radius(made(report, resonance), 1e-3) == 1
    assert dh.theory.interaction_radius(made(report, resonance), 1e-3, rate=1e-2) == 2  # 10⁻⁴ is the first below
    assert dh.theory.interaction_radius(made(report, resonance), 1e-9) == 4
    assert dh.theory.interaction_radius(report, 0.1, rate=1.0) is None


def test_graph(report: dh.CurvatureReport, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("networkx")
    graph = dh.theory.resonance_graph(report, "coupling", threshold=0.5)
    strong = np.triu(report.coupling > 0.5, 1)
    assert list(graph) == list(report.names) and graph.number_of_edges() == strong.sum()
    for v, w, data in graph.edges(data=True):
        assert data["weight"] == report.coupling[report.index(v), report.index(w)]
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(DependencyError, match="network"):
        dh.theory.resonance_graph(report)


def test_refusals(report: dh.CurvatureReport) -> None:
    with pytest.raises(OptionError, match="metric"):
        dh.theory.decay_fit(report, "resonanse")
    with pytest.raises(OptionError, match="a line needs two"):
        dh.theory.decay_fit(report, "tensor_norm") if not report.tensor_norm.any() else dh.theory.decay_fit(
            dh.analyze(nn.Sequential(nn.Linear(4, 3)).double(), batch(), points="0")
        )
    with pytest.raises(OptionError, match="epsilon"):
        dh.theory.interaction_radius(report, 2.0)
    with pytest.raises(OptionError, match="rate"):
        dh.theory.interaction_radius(report, 0.1, rate=-1.0)
