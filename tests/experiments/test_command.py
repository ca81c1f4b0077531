"""Every experiment from the command line to its page, small; wrong usage is told before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dag_hesse.cli import main
from dag_hesse.experiments import ablation, command, exp1, exp1b, exp2, exp6
from dag_hesse.experiments.command import PAPER
from dag_hesse.experiments.results import Results

CASES: dict[str, tuple[str, ...]] = {
    "exp2": ("6/4", "6/16"),
    "ablation": ("gelu", "stable-rank"),
    "exp6": ("relu/plain", "silu/residual"),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (exp1, "DEPTHS", (3,)), (exp1b, "DEPTHS", (3,)), (exp6, "QUICK_WIDTH", 4), (exp6, "PROBES", 4), (exp2, "BASE", 24), (ablation, "DRAWS", 3),
        (ablation, "DEPTH", 3),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("name", PAPER)
def test_an_experiment_from_end_to_end(
    name: str, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = CASES.get(name, ("*",))
    assert main(["experiment", name, "--seeds", "42", "--out", str(tmp_path), "--cases", *cases]) == 0
    printed = capsys.readouterr().out
    assert "[yes]" in printed or name == "ablation"  # which compares seeds
    assert "Quick run, not the paper's protocol" in printed
    folder = tmp_path / name
    results = Results.read(folder / "results.json")
    trained = name not in ("exp2", "exp6", "ablation")
    assert results.checkpoints[-1] == ("final" if trained else "init")
    assert list(folder.glob("*.png"))
    assert "data:image/png" in (folder / "index.html").read_text(encoding="utf-8")
    assert "ours" in (folder / "tables.md").read_text(encoding="utf-8")
    before = (folder / "results.json").read_bytes()
    assert main(["experiment", name, "--seeds", "42", "--out", str(tmp_path), "--resume", "--cases", *cases]) == 0
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["exp9"], 2, "invalid choice"),
        ([], 2, "NAME"),
        (["exp3", "--seeds", "x"], 2, "--seeds"),
        (["exp3", "--quick", "--full"], 2, "not allowed"),
        (["exp3", "--data", "/nowhere"], 1, "MissingFileError: --data /nowhere is no folder"),
        (["exp3", "exp5", "--cases", "relu"], 1, "OptionError: --cases relu fits none of exp5's"),
        (["exp3", "--seeds", "-3"], 1, "OptionError: seeds=-3"),
    ],
)
def test_wrong_usage(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["experiment", *arguments, "--out", str(tmp_path / "out")])
    except SystemExit as stopped:
        found = int(stopped.code or 0)
    assert found == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_module_runs_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["exp5", "--init", "--seeds", "42", "--out", str(tmp_path)])
    assert "Table 7" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="ExperimentError"):
        command.main(["exp5", "--init", "--seeds", "42", "--out", str(tmp_path)])


def test_an_interruption_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def interrupted(*_: Any) -> Callable[..., Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("dag_hesse.experiments.runner._measured", interrupted)
    assert main(["experiment", "exp5", "--out", str(tmp_path)]) == 130
    assert "--resume" in capsys.readouterr().err
