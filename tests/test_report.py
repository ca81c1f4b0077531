"""The report: text, files, pictures; the command line around it."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import dag_hesse as dh
from dag_hesse.cli import BUILT_IN, main
from dag_hesse.errors import DependencyError, MissingFileError, OptionError, PointError, ReportFileError, StaleError
from dag_hesse.estimate import METRICS
from dag_hesse.experiments.models import mlp
from dag_hesse.files import write_whole
from dag_hesse.ir import Point
from dag_hesse.plan import Method
from dag_hesse.progress import shown
from dag_hesse.report.text import cells
from tests.page.reports import made

SPEC = """
import sys
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
def with_loss():
    return (*make(), nn.CrossEntropyLoss(label_smoothing=0.1))
class Slow(nn.Sequential):
    def forward(self, x):
        print("forward", file=sys.stderr, flush=True)
        return super().forward(x)
def slow():
    model = Slow(*[layer for _ in range(6) for layer in (nn.Linear(800, 800), nn.Tanh())])
    return model, (torch.randn(64, 800), torch.randn(64, 800))
def nonsense():
    return 3
"""


@pytest.fixture
def report() -> dh.CurvatureReport:
    torch.manual_seed(0)
    model = mlp([3, 40, 40, 40, 3], nn.SiLU)
    return dh.analyze(model, (torch.randn(6, 3), torch.arange(6) % 3), probes=4, mode="probes")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "specs_for_test.py").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "specs_for_test", raising=False)
    return tmp_path


def test_the_text_shows_every_metric_with_errors(report: dh.CurvatureReport) -> None:
    text = str(report)
    for word in ("R  ‖H‖_F", "C  coupling", "D  stable rank", "GN-gap", "±", "Sequential", "probes", *report.names):
        assert word in text
    assert max(map(len, text.splitlines())) <= 110


def _large(count: int) -> dh.CurvatureReport:
    """A map of random numbers, with some of every kind of cell."""
    random = np.random.default_rng(0)
    points = tuple(Point(f"層{k}.weight", (3,), 3, "parameter", (k,)) for k in range(count))
    shape = (count, count)
    values = {name: random.lognormal(0.0, 9.0, shape) for name in METRICS}
    stderr = {name: value * random.uniform(0.0, 0.1, shape).round(1) for name, value in values.items()}
    method = {name: random.choice([str(method) for method in Method], shape) for name in METRICS}
    for value in values.values():
        value[random.random(shape) < 0.1] = float("nan")
    facts = {"model": "Net", "space": "parameter", "loss": 1.0, "batch_size": 2, "batch_mode": "shared", "sweeps": 3}
    whole = {**facts, "seconds": {"total": 1.0}, "opaque": [], "lost": []}
    zeros = np.zeros(shape, dtype=np.int64)
    return dh.CurvatureReport(points, values, stderr, method, zeros, zeros, whole)


def test_long_names_are_shortened_in_text_and_no_two_alike() -> None:
    for count in (5, 16, 64):
        report = made(count)
        lines = str(report).splitlines()
        head = next(line for line in lines if "┃" in line)
        heads = [word.strip() for word in head.split("┃")[1:]]
        rows = [line.split("│")[0].strip() for line in lines if "│" in line][:count]
        for names in (heads, rows):
            assert len(set(names)) == count
            assert all(name.endswith(full.rpartition(".")[2]) for name, full in zip(names, report.names, strict=True))
        assert max(map(len, heads)) <= 24 and max(map(len, rows)) <= 40


def test_tables_are_drawn_as_rich_would() -> None:
    report, buffer = _large(9), io.StringIO()
    for metric in ("resonance", "coupling", "stable_rank", "gn_gap"):
        table = Table(show_edge=False, pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in report.names:
            table.add_column(name, justify="right", no_wrap=True)
        for name, row in zip(report.names, cells(report, metric), strict=True):
            table.add_row(name, *(text for text, _ in row))
        Console(file=buffer, width=500, color_system=None).print(table)
    expected = [line.rstrip() for line in buffer.getvalue().splitlines()]
    assert [line for line in str(report).splitlines() if "┃" in line or "│" in line or "━" in line] == expected
    assert {"0", "-"} <= {text for row in cells(report, "resonance") for text, _ in row}


def test_a_map_of_many_points_is_shown_at_once() -> None:
    report = _large(161)
    for show, seconds in ((str, 2.0), (dh.CurvatureReport._repr_html_, 2.0), (dh.CurvatureReport.rows, 4.0)):
        start = time.process_time()
        assert report.names[-1] in str(show(report))
        assert time.process_time() - start < seconds


def test_save_and_load(report: dh.CurvatureReport, tmp_path: Path) -> None:
    report.save(tmp_path / "a.safetensors")
    loaded = dh.load(tmp_path / "a.safetensors")
    assert loaded.points == report.points
    for name in report.values:
        for ours, theirs in ((report.values, loaded.values), (report.stderr, loaded.stderr)):
            assert np.array_equal(ours[name], theirs[name], equal_nan=True)
        assert (report.method[name] == loaded.method[name]).all()
    assert loaded.facts == report.facts
    assert str(loaded) == str(report)
    with pytest.raises(StaleError, match="analyze"):
        loaded.block("1", "1")


def test_json_and_html(report: dh.CurvatureReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.to_json(tmp_path / "deep" / "a.json")
    data = json.loads((tmp_path / "deep" / "a.json").read_text())
    assert data["metrics"]["resonance"]["value"][0][1] == report.resonance[0, 1]
    assert [p["name"] for p in data["points"]] == list(report.names)
    report.to_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert all(f'"name":"{name}"' in page for name in report.names)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.to_html(tmp_path / "b.html")
    assert (tmp_path / "b.html").read_text() == page
    for wrong in ({"spectra": 3}, {"against": 3}):
        with pytest.raises(OptionError, match="int"):
            report.to_html(tmp_path / "c.html", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "c.html").exists()


def test_a_report_says_the_call_that_makes_it() -> None:
    batch = [(torch.randn(4, 3), torch.arange(4) % 2), (torch.randn(2, 3), torch.arange(2))]
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    report = dh.analyze(model, batch, reduction=lambda *_: 1.0, probes=np.int64(4), progress=False)
    assert report.facts["call"] == "dag_hesse.analyze(model, batch, probes=4, reduction=reduction)"
    assert "reduction=[1.0, 2.0]" in dh.analyze(model, batch, reduction=[1.0, 2.0]).facts["call"]
    assert report.facts["curved ops"] == {}
    trained = dh.analyze(model, batch, space="parameter").facts
    assert (trained["call"], trained["curved ops"]) == ("dag_hesse.analyze(model, batch, space='parameter')", {"mm": 1})


def test_files_that_are_no_reports(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"nonsense")
    with pytest.raises(ReportFileError, match="not a report"):
        dh.load(tmp_path / "a")
    with pytest.raises(MissingFileError, match="no report"):
        dh.load(tmp_path / "b")


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("before")

    def interrupted(place: Path) -> None:
        place.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(target, interrupted)
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_files_have_the_mode_that_the_umask_leaves(report: dh.CurvatureReport, tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o007, 0o660), (0o077, 0o600)):
        folder = tmp_path / str(mask)  # files that are there keep their modes
        before = os.umask(mask)
        try:
            report.save(folder / "a.dh")
            report.to_json(folder / "a.json")
            write_whole(folder / "a.png", lambda place: report.plot().savefig(place))
        finally:
            os.umask(before)
        assert {(folder / name).stat().st_mode & 0o777 for name in ("a.dh", "a.json", "a.png")} == {mode}


def test_unknown_point_of_a_report(report: dh.CurvatureReport) -> None:
    with pytest.raises(PointError, match="'1'"):
        report.index("11")
    with pytest.raises(OptionError, match="tensor"):
        report.block("1", "1", part="tensors")


def test_a_report_is_pickled_and_copied_without_its_model(report: dh.CurvatureReport) -> None:
    assert report.block("1", "1").shape == (40, 40)
    for other in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report), copy.copy(report)):
        assert other.points == report.points
        assert np.array_equal(other.resonance, report.resonance)
        assert str(other) == str(report)
        assert other.facts == report.facts
        with pytest.raises(StaleError, match="analyze"):
            other.block("1", "1")
    assert report.block("1", "1").shape == (40, 40)


def test_rows_and_data_frames(report: dh.CurvatureReport, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = report.rows()
    assert [(row["v"], row["w"]) for row in rows[:2]] == [("1", "1"), ("1", "3")]
    assert len(rows) == 6
    assert rows[1]["coupling"] == report.coupling[0, 1]
    assert rows[1]["coupling_stderr"] == report.stderr["coupling"][0, 1]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DependencyError, match=r"dag-hesse\[pandas\]"):
        report.to_dataframe()
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    assert report.to_dataframe() == rows


def test_a_notebook_shows_facts_and_maps(report: dh.CurvatureReport) -> None:
    page = report._repr_html_()
    assert page.count("<table>") == 3
    assert "3 activation points" in page
    assert "<html" not in page


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, batch = mlp([3, 40, 40, 3], nn.SiLU), (torch.randn(6, 3), torch.arange(6) % 3)
    seen: list[tuple[str, int, int]] = []
    options = {"mode": "probes", "probes": 4}
    dh.analyze(model, batch, progress=lambda *said: seen.append(said), **options)
    assert seen[0] == ("probes", 0, 8)
    for silent in (None, False):
        dh.analyze(model, batch, progress=silent, **options)
        assert capsys.readouterr().err == ""
    dh.analyze(model, batch, progress=True, **options)
    assert "dag-hesse: probes 8/8 sweeps" in capsys.readouterr().err
    for wrong in ("yes", 1, 0):
        with pytest.raises(OptionError, match=f"progress={wrong!r}"):
            dh.analyze(nn.Identity(), None, progress=wrong, **options)  # type: ignore[arg-type]  # before anything else


@pytest.mark.parametrize(("seconds", "appears"), [(0.02, False), (0.2, True)])
def test_a_bar_comes_unasked_in_a_terminal_where_work_is_long(
    seconds: float, appears: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(np.arange(1000) * seconds)
    monkeypatch.setattr("dag_hesse.progress.time.perf_counter", lambda: next(clock))
    with shown(None) as told:
        assert told is None  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with shown(None) as told:
        assert told is not None
        for done in range(21):
            told("probes", done, 20)
    assert ("probes" in capsys.readouterr().err) is appears
    with shown(False) as told:
        assert told is None


def test_analyze_from_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "specs_for_test:make", "--points", "0", "1", "--json", "a.json", "--out", "out"]) == 0
    out, err = capsys.readouterr()
    assert "coupling" in out
    assert err == ""
    assert json.loads((here / "a.json").read_text())["points"][0]["name"] == "0"
    assert sorted(os.listdir(here / "out")) == ["report.html", "report.json", "report.png", "report.safetensors"]
    assert dh.load(here / "out" / "report.safetensors").names == ("0", "1")
    assert main(["analyze", "specs_for_test:with_loss", "--space", "parameter", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["resnet19"], "resnet18"),
        (["specs_for_test:nothing"], "nothing"),
        (["no_such_module:make"], "no_such_module"),
        (["specs_for_test:nonsense"], "expected (model, batch)"),
        (["specs_for_test:make", "--points", "layer"], "PointError"),
        (["specs_for_test:make", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_refusals_exit_with_1(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["analyze", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["analyze"],
        ["analyze", "mlp", "--mode", "exakt"],
        ["analyse", "mlp"],
        *(["analyze", "mlp", option, "0"] for option in ("--memory", "--batch", "--image")),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_help_names_every_option_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["analyze", "--help"])
    assert stop.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    for word in ("--points", "--mode", "--probes", "--space", "--seed", "--device", "--json", "--out", *BUILT_IN):
        assert word in text


def test_ctrl_c_leaves_nothing_half_written(here: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dag_hesse",
        "analyze",
        "specs_for_test:slow",
        "--mode",
        "exact",
        "--out",
        "out",
    ]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stderr is not None
    for _ in range(2):  # of the capture and of its proof; what comes then takes seconds
        assert process.stderr.readline() == "forward\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing was written" in err
    assert not (here / "out").exists()


@pytest.mark.parametrize("name", ["mlp", "toy-attention", "gpt2", "plain-resnet18"])
def test_the_built_in_models(name: str, tmp_path: Path) -> None:
    sizes = ["--batch", "2", "--image", "8", "--probes", "2"]
    assert main(["analyze", name, *sizes, "--quiet", "--json", str(tmp_path / "a.json")]) == 0
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["facts"]["batch_size"] == 2 and len(data["points"]) > 1
    assert all(x > 0 for x in np.diag(np.array(data["metrics"]["resonance"]["value"], dtype=float)))


def test_reports_say_what_float32_products_are_rounded_to(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = (torch.randn(6, 5), torch.arange(6) % 3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    assert "precision" not in str(dh.analyze(model, batch))
    torch.set_float32_matmul_precision("medium")
    try:
        assert "precision: float32 matrix products at 'medium' precision" in str(dh.analyze(model, batch))
    finally:
        torch.set_float32_matmul_precision("highest")
