"""Reports as values: taken apart, compared, put in a row."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors
from dag_hesse.estimate import METRICS
from dag_hesse.report.pairs import number


def _net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 40), nn.SiLU(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.SiLU(), nn.Linear(40, 3)]
    return nn.Sequential(*layers)


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator), torch.arange(6) % 3


def _report(model: nn.Module | None = None, **options: Any) -> dh.CurvatureReport:
    return dh.analyze(model or _net(), _batch(), **{"mode": "probes", "probes": 8, **options})


def test_taken_apart() -> None:
    report = _report()
    assert len(report) == 3 and [point.name for point in report] == ["1", "3", "5"] == list(report.names)
    assert "3" in report and report.points[1] in report and "4" not in report
    for metric in METRICS:
        assert report[metric] is report.values[metric]
    pair = report["1", "5"]
    assert (pair.v, pair.w, pair.distance) == ("1", "5", report.distance[0, 2])
    for metric in METRICS:
        reading = getattr(pair, metric)
        expected = (report.values[metric][0, 2], report.stderr[metric][0, 2], report.method[metric][0, 2])
        assert np.array_equal(np.array(reading, dtype=object), np.array(expected, dtype=object))
    assert float(pair.resonance) == report.resonance[0, 2]
    assert str(pair).startswith(f"1 – 5 (distance {pair.distance}): resonance {pair.resonance}, ")
    assert report[0, -1] == pair
    assert repr(report) == "CurvatureReport(3 activation points of Sequential: 1, 3, 5)"
    for key, kind in (
        ("resonanse", errors.OptionError),
        (3, errors.OptionError),
        (("1", "2"), errors.PointError),
        (("1", "3", "5"), errors.PointError),
    ):
        with pytest.raises(kind):
            report[key]


def test_small_errors_are_not_shown_as_none() -> None:
    assert number(2.0, 0.002, "probes") == "2 ±<0.5%"
    assert number(2.0, 0.02, "probes") == "2 ±1%"
    assert number(2.0, 0.2, "probes") == "2 ±10%"
    assert number(2.0, 0.0, "exact") == "2"


def test_differences_in_standard_errors() -> None:
    one = _report(seed=0)
    scores = []
    for seed in range(1, 40):
        found = one.compare(_report(seed=seed))
        scores.append(found.score["gn_norm"][np.triu_indices(3)])
        error = np.hypot(one.stderr["resonance"], found.stderr["resonance"])
        assert (error >= one.stderr["resonance"]).all()
    assert np.isfinite(scores).all()
    exact = _report(mode="exact")
    many = exact.compare(_report(probes=64))
    assert np.abs(many.score["resonance"]).max() < 5
    assert np.array_equal(many.difference["resonance"], many.after["resonance"] - many.before["resonance"])
    assert not exact.compare(exact).score["resonance"].any()
    other = exact.compare(_report(_net(1), mode="exact"))
    assert np.isinf(other.score["resonance"]).all()
    assert [abs(row["score"]) for row in many.rows()] == sorted((abs(r["score"]) for r in many.rows()), reverse=True)
    assert "σ)" in str(many) and len(str(many).splitlines()) == 7


def test_reports_of_other_points_are_compared_over_those_they_share() -> None:
    few, all_three = _report(points=["5", "1"]), _report()
    found = all_three.compare(few)
    assert found.names == ("1", "5") and found.missing == ("3",)
    assert found.before["resonance"][0, 1] == all_three.resonance[0, 2]
    assert "in one of the reports alone: 3" in str(found)
    for other, kind in (
        (_report(points=["3"]), errors.PointError),
        (_report(batch_mode="per_sample", points=["1", "5"]), errors.OptionError),
        ("report", errors.OptionError),
    ):
        with pytest.raises(kind):
            few.compare(other)  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match="metric"):
        found.rows("size")


def test_checkpoints_in_a_row() -> None:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    reports = {}
    for step in (0, 10, 20):
        reports[step] = _report(model)
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(_batch()[0]), _batch()[1]).backward()
            optimizer.step()
    series = dh.concat(reports)
    assert series.steps == (0, 10, 20) and len(series) == 3 and list(series) == list(reports.values())
    assert np.array_equal(series["resonance"][1], reports[10].resonance)
    assert np.array_equal(series.stderr("coupling")[2], reports[20].stderr["coupling"])
    assert [pair.resonance.value for pair in series["1", "3"]] == [r.resonance[0, 1] for r in reports.values()]
    assert series[-1] is reports[20] and series[1:].steps == (10, 20)
    assert dh.concat(list(reports.values())[::-1], steps=[2.5, 1, 0]).reports == tuple(reports.values())
    frame = series.to_dataframe()
    assert len(frame) == 18 and frame["step"].tolist() == [0] * 6 + [10] * 6 + [20] * 6
    axes = series.plot("resonance").axes[0]
    assert [line.get_label() for line in axes.lines] == ["1", "3", "5"]
    assert np.array_equal(axes.lines[0].get_xydata()[:, 1], series["resonance"][:, 0, 0])
    some = series.plot("coupling", pairs=[("1", "5"), (0, 1)]).axes[0]
    assert [line.get_label() for line in some.lines] == ["1 – 5", "1 – 3"]
    assert len(some.collections) == 2  # bands of two standard errors


def test_what_cannot_be_put_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    report, few = _report(), _report(points=["1", "5"])
    wrong: list[tuple[Any, Any]] = [
        ([], None),
        (report, None),
        (3, None),
        ([report, "x"], None),
        ([report, report], [0]),
        ([report, report], [1, 1]),
        ([report], ["start"]),
    ]
    for reports, steps in wrong:
        with pytest.raises(errors.OptionError):
            dh.concat(reports, steps)
    with pytest.raises(errors.PointError, match="same points"):
        dh.concat([report, few])
    series = dh.concat([report, report])
    for bad in (
        lambda: series[5],
        lambda: series["size"],
        lambda: series.plot("size"),
        lambda: series.plot(pairs="13"),
    ):
        with pytest.raises(errors.OptionError):
            bad()
    with pytest.raises(errors.PointError):
        series.plot(pairs=[("1", "2")])
    monkeypatch.setitem(sys.modules, "pandas", None)
    for frame in (series.to_dataframe, report.to_dataframe, report.compare(report).to_dataframe):
        with pytest.raises(errors.DependencyError, match="pandas"):
            frame()


def test_an_angle_at_the_origin_in_a_branch_that_is_not_taken() -> None:
    class Angles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            z = torch.relu(h)
            w = z.roll(1, 1)
            return self.b(torch.where((z == 0) & (w == 0), h.sin(), torch.atan2(z, w)))

    net, x, y = Angles(), torch.randn(6, 4).double(), torch.arange(6) % 3
    own = list(net.parameters())
    first = torch.autograd.grad(F.cross_entropy(net(x), y), own, create_graph=True)
    rows = [
        torch.autograd.grad(g, own, retain_graph=True, materialize_grads=True) for e in first for g in e.reshape(-1)
    ]
    expected = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    assert (torch.relu(net.a(x)) == 0).logical_and(torch.relu(net.a(x)).roll(1, 1) == 0).any()
    assert (dh.HessianOperator(net, (x, y)).dense() - expected).norm() < 1e-12 * expected.norm()
