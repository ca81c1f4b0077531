"""``pairs=``: chosen pairs alone, with the same figures as in the whole map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.cli import main
from dag_hesse.estimate import METRICS


def _curved() -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    layers = [part for _ in range(4) for part in (nn.Linear(6, 6), nn.SiLU())]
    return nn.Sequential(*layers, nn.Linear(6, 3)).double(), (torch.randn(5, 6).double(), torch.arange(5) % 3)


def _whole(**options: Any) -> tuple[dh.CurvatureReport, dh.CurvatureReport]:
    """Maps of four points, and of two of their pairs."""
    model, batch = _curved()
    points = ["0", "2", "4", "6"]
    whole = dh.analyze(model, batch, points=points, progress=False, **options)
    return whole, dh.analyze(model, batch, points=points, pairs=[("0", "4"), (2, "4")], progress=False, **options)


@pytest.mark.parametrize("mode", ["exact", "auto", "gram", "probes"])
def test_figures_are_those_of_the_whole_map(mode: str) -> None:
    whole, some = _whole(mode=mode)
    asked = {(0, 2), (0, 0), (2, 2)}
    for v in range(4):
        for w in range(v, 4):
            for name in METRICS:
                found, expected = some.values[name][v, w], whole.values[name][v, w]
                if (v, w) in asked:  # probes are of their source, whatever else is swept
                    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), (name, v, w)
                else:
                    assert np.isnan(found) or found == 0.0 == expected, (name, v, w)
    assert {str(m) for m in some.method["resonance"][3]} <= {"skipped"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("batch_mode", ["shared", "per_sample", "joint"])
@pytest.mark.parametrize("mode", ["exact", "gram", "probes"])
def test_pairs_that_were_not_asked_for_warn_of_nothing(mode: str, batch_mode: str, tmp_path: Path) -> None:
    whole, some = _whole(mode=mode, batch_mode=batch_mode)
    for name in METRICS:
        assert some.values[name][0, 2] == pytest.approx(whole.values[name][0, 2], rel=1e-9, abs=1e-12, nan_ok=True)
        assert some.stderr[name][0, 2] == pytest.approx(whole.stderr[name][0, 2], rel=1e-9, abs=1e-12, nan_ok=True)
    assert np.isnan(some.stable_rank[0, 1]) and np.isnan(some.stderr["stable_rank"][0, 1])
    assert "NaN" not in str(some)
    some.to_json(tmp_path / "a.json")
    some.to_html(tmp_path / "a.html")
    some.plot(path=tmp_path / "a.png")


def test_only_what_is_asked_is_swept() -> None:
    whole, some = _whole(mode="exact")
    assert some.facts["sweeps"] < whole.facts["sweeps"]
    assert some.facts["predicted_flops"] < 0.7 * whole.facts["predicted_flops"]


def test_points_are_those_that_pairs_name() -> None:
    model, batch = _curved()
    found = dh.analyze(model, batch, pairs=[("6", "0")], progress=False)
    assert found.names == ("0", "6")
    assert not np.isnan(found.resonance).any()
    assert "pairs=[['6', '0']]" in found.facts["call"]
    globs = dh.analyze(model, batch, points=["0", "2", "4"], pairs=[("4", "[02]")], progress=False)
    assert (globs.method["resonance"] == "skipped").tolist() == [
        [False, True, False],
        [True, False, False],
        [False] * 3,
    ]


def test_what_is_zero_stays_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    batch = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    found = dh.analyze(model, batch, points=["0", "2", "4"], pairs=[("0", "2")], progress=False)
    assert (found.tensor_norm == 0).all() and (found.gn_gap == 0).all()
    assert np.isnan(found.gn_norm[2]).all() and found.coupling[0, 0] == 1.0


def test_reports_with_gaps_are_written_and_read(tmp_path: Any) -> None:
    _, some = _whole()
    assert "skipped" in str(some)
    some.save(tmp_path / "some.safetensors")
    some.to_html(tmp_path / "some.html")
    some.to_json(tmp_path / "some.json")
    again = dh.load(tmp_path / "some.safetensors")
    np.testing.assert_array_equal(again.resonance, some.resonance)
    assert json.loads((tmp_path / "some.json").read_text())["metrics"]["resonance"]["value"][0][1] is None


@pytest.mark.parametrize("pairs", ["ab", [], [("0",)], [("0", "2", "4")], 3, ["02"]])
def test_what_is_no_pair(pairs: Any) -> None:
    model, batch = _curved()
    with pytest.raises(dh.errors.OptionError, match="expected pairs of points"):
        dh.analyze(model, batch, pairs=pairs)


@pytest.mark.parametrize("end", [np.ones(3), ["0"], dict, None, 1.5])
def test_what_is_no_end_of_a_pair(end: Any) -> None:
    model, batch = _curved()
    with pytest.raises(dh.errors.OptionError, match=f"pairs holds a {type(end).__name__} as a point; expected a name"):
        dh.analyze(model, batch, pairs=[("0", "2"), ("0", end)])


def test_names_of_no_point() -> None:
    model, batch = _curved()
    for pair in [("0", "nope"), ("0", 7)]:
        with pytest.raises(dh.errors.PointError):
            dh.analyze(model, batch, points=["0", "2"], pairs=[pair])


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "mlp", "--batch", "4", "--image", "2", "--pair", "0", "4", "--json", "-"]) == 0
    assert [point["name"] for point in json.loads(capsys.readouterr().out)["points"]] == ["0", "4"]
