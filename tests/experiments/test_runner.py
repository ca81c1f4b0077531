"""The runner: what is interrupted and taken up ends in the same bits; wrong requests are typed errors before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dag_hesse.errors import DagHesseError, ExperimentError, OptionError
from dag_hesse.experiments import exp3, exp3b, page, runner
from dag_hesse.experiments.command import PAPER, load
from dag_hesse.experiments.data import Data, Split
from dag_hesse.experiments.mlps import plain_mlp
from dag_hesse.experiments.protocol import Case, Experiment
from dag_hesse.experiments.results import Published, Results, Stat, deviation
from dag_hesse.experiments.runner import Options, check_place, run
from dag_hesse.experiments.training import Recipe, Training, evaluated

RECIPE = Recipe(epochs=4, batch=8)


def _scaled(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random in training, as augmented images are."""
    return x if generator is None else x + 0.1 * torch.randn(x.shape, generator=generator)


def small_data(folder: Path | None = None) -> Data:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=g), torch.randint(0, 3, (40,), generator=g)
    return Data("noise", Split(x[:30], y[:30], _scaled), Split(x[30:], y[30:], _scaled), 3)


def small_cases(full: bool) -> list[Case]:
    spectral = partial(plain_mlp, 2, 4, 3, "silu", norm=False, spectral=True, inputs=6)
    plain = partial(plain_mlp, 2, 4, 3, "relu", inputs=6)
    return [Case("relu", plain, exp3.measure, 5, RECIPE), Case("silu", spectral, exp3.measure, 5, RECIPE)]


EXPERIMENT = Experiment(
    "exp3", "small", "nowhere", small_data, small_cases, "all", exp3.tables, exp3.claims, exp3.figures
)


def values(results: Results) -> dict[Any, Any]:
    """Without seconds."""
    return {key: (cell["epoch"], cell["values"]) for key, cell in results.cells.items()}


class Killed(BaseException):
    """As a signal would be."""


def killed_after(monkeypatch: pytest.MonkeyPatch, where: str, count: int) -> None:
    """End the process's work at the n-th epoch, or at the n-th measurement."""
    owner: Any = Training if where == "run_epoch" else runner
    name, left = where, count
    original: Callable[..., Any] = getattr(owner, name)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopped)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return values(run(EXPERIMENT, Options(out=tmp_path_factory.mktemp("whole")), False))


@pytest.mark.parametrize(
    "where, count", [("run_epoch", 1), ("run_epoch", 3), ("run_epoch", 9), ("_measured", 1), ("_measured", 5)]
)
def test_what_is_killed_is_taken_up_bit_by_bit(
    where: str, count: int, whole: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_SAVED", 0.0)  # after every epoch
    with monkeypatch.context() as patch:
        killed_after(patch, where, count)
        with pytest.raises(Killed):
            run(EXPERIMENT, Options(out=tmp_path), False)
    torch.manual_seed(99)
    assert values(run(EXPERIMENT, Options(out=tmp_path, resume=True), False)) == whole
    assert not list((tmp_path / "exp3" / "states").glob("*"))


def test_initialization_first_and_training_later(whole: dict[Any, Any], tmp_path: Path) -> None:
    first = run(EXPERIMENT, Options(out=tmp_path, init=True, cases=["re*"]), False)
    assert set(values(first)) == {("relu", 42, "init"), ("relu", 43, "init")}
    second = run(EXPERIMENT, Options(out=tmp_path, resume=True), False)
    assert values(second) == whole


def test_fewer_epochs_are_another_run_that_says_so(whole: dict[Any, Any], tmp_path: Path) -> None:
    shorter = run(EXPERIMENT, Options(out=tmp_path, epochs=2), False)
    epochs = {"init": 0, "mid": 1, "final": 2}
    assert {when: epoch for (_, _, when), (epoch, _) in values(shorter).items()} == epochs
    at_init = {key: cell for key, cell in whole.items() if key[2] == "init"}
    assert {key: cell for key, cell in values(shorter).items() if key[2] == "init"} == at_init
    assert "Trained for 2 epochs at most" in "\n".join(page.what_ran(EXPERIMENT, shorter))
    for other in (Options(out=tmp_path, resume=True), Options(out=tmp_path, resume=True, epochs=3)):
        with pytest.raises(ExperimentError, match="other epochs"):
            run(EXPERIMENT, other, False)
    with pytest.raises(OptionError, match="--init trains nothing"):
        run(EXPERIMENT, Options(out=tmp_path, epochs=0), False)


def test_cells_are_those_of_the_protocol(whole: dict[Any, Any]) -> None:
    epochs = {"init": 0, "mid": 2, "final": 4}
    assert {(case, seed, when): e for (case, seed, when), (e, _) in whole.items()} == {
        (case, seed, when): epoch for case in ("relu", "silu") for seed in (42, 43) for when, epoch in epochs.items()
    }
    assert whole["relu", 42, "init"] != whole["relu", 43, "init"]
    assert whole["relu", 42, "init"] != whole["relu", 42, "final"]


def test_nothing_global_changes(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(EXPERIMENT, Options(out=tmp_path, seeds=[1], cases=["relu"]), False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_of_another_recipe_is_not_taken_up(
    whole: dict[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_SAVED", 0.0)
    other = Experiment(
        **{**EXPERIMENT.__dict__, "cases": lambda full: [_with_rate(case) for case in small_cases(full)]}
    )
    with monkeypatch.context() as patch:
        killed_after(patch, "run_epoch", 1)
        with pytest.raises(Killed):
            run(other, Options(out=tmp_path), False)
    (tmp_path / "exp3" / "results.json").unlink()
    assert values(run(EXPERIMENT, Options(out=tmp_path), False)) == whole


def _with_rate(case: Case) -> Case:
    return Case(case.name, case.build, case.measure, case.samples, Recipe(epochs=4, batch=8, rate=0.5))


def test_results_are_not_written_over(tmp_path: Path) -> None:
    run(EXPERIMENT, Options(out=tmp_path, init=True), False)
    with pytest.raises(ExperimentError, match="--resume"):
        run(EXPERIMENT, Options(out=tmp_path), False)
    with pytest.raises(ExperimentError, match="other protocol"):
        run(EXPERIMENT, Options(out=tmp_path, full=True, resume=True), False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": [1.5]}, "seeds=1.5"),
        ({"seeds": [-1]}, "seeds=-1"),
        ({"cases": ["nope"]}, "relu, silu"),
        ({"out": "file"}, "no folder"),
    ],
)
def test_wrong_requests(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = {"out": tmp_path, **options}
    options["out"] = tmp_path / options["out"]
    with pytest.raises(OptionError, match=message):
        run(EXPERIMENT, Options(**options), False)


def test_results_that_could_not_be_written_are_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / EXPERIMENT.name / "results.json").mkdir(parents=True)
    with pytest.raises(OptionError, match=r"results\.json' is no file's name"):
        check_place(tmp_path / EXPERIMENT.name, Options(out=tmp_path, resume=True))
    check_place(tmp_path / "other", Options(out=tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": [{"case": 1}]}', "\x00"])
def test_a_file_that_holds_no_results(text: str, tmp_path: Path) -> None:
    (tmp_path / "exp3").mkdir()
    (tmp_path / "exp3" / "results.json").write_text(text)
    with pytest.raises(ExperimentError, match="does not hold"):
        run(EXPERIMENT, Options(out=tmp_path, resume=True), False)


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"seed": "42"}, "does not hold"),
        ({"values": {"R 0": "x"}}, "does not hold"),
        ({"values": {"R 0": [1]}}, "does not hold"),
        ({"values": {}}, "does not hold"),
        ({"epoch": None}, "does not hold"),
        ({"seed": 43}, "twice"),
        ({"case": "nope"}, "other cases: 'nope'"),
    ],
)
def test_cells_that_were_edited(edit: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = Options(out=tmp_path, init=True, seeds=[42, 43])
    run(EXPERIMENT, options, False)
    file = tmp_path / EXPERIMENT.name / "results.json"
    data = json.loads(file.read_text())
    next(cell for cell in data["cells"] if cell["seed"] == 42).update(edit)
    file.write_text(json.dumps(data))
    with pytest.raises(ExperimentError, match=message):
        run(EXPERIMENT, replace(options, resume=True), False)


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    results = Results(
        {"experiment": "x"}, {("a", 1, "init"): {"epoch": 0, "values": {"D 1": float("nan"), "R": 0.1}, "seconds": {}}}
    )
    results.write(tmp_path / "r.json")
    assert "NaN" not in (tmp_path / "r.json").read_text()
    back = Results.read(tmp_path / "r.json")
    assert back.stat("a", "init", "D 1") is None
    assert back.stat("a", "init", "R") == Stat(0.1, 0.0, 1)
    assert json.loads((tmp_path / "r.json").read_text())["experiment"] == "x"


def test_deviations() -> None:
    assert deviation(Stat(1.5, 0.1), Stat(1.0, 0.25)) == 2.0
    assert deviation(Stat(0.0, 0.0), Stat(1e-7, 1e-8)) is None  # ours is exactly zero, the paper's is rounding
    assert deviation(Stat(1.0, 0.1), Stat(1.0, 0.0)) is None
    assert deviation(None, Stat(1.0, 0.1)) is None
    assert Stat.of([1.0, 3.0, float("nan")]) == Stat(2.0, 1.0, 2)
    assert Stat.of([]) is None


@pytest.mark.parametrize("name", PAPER)
def test_published_figures_are_of_the_cases(name: str) -> None:
    published = Published.of(name)
    known = {case.name for case in load(name).cases(True)}
    assert set(published.cases) - known <= {"16/plain", "16/residual"} or set(published.cases) <= known
    assert published.source


def test_published_figures_are_the_papers() -> None:
    assert Published.of("exp1").stat("8/plain", "init", "rho").mean == pytest.approx(2.59, abs=0.005)
    assert Published.of("exp3b").stat("gelu", "init", "gap") == Stat(2.2959, 0.41505)
    assert Published.of("exp4").stat("2/cat_silu", "init", "gap").mean == pytest.approx(1.33, abs=0.005)
    assert Published.of("exp6").stat("silu/residual", "init", "gap 3").mean == pytest.approx(0.642, abs=0.0005)
    assert Published.of("exp2").stat("6/256", "init", "D far").std == pytest.approx(0.84, abs=0.005)
    assert Published.of("exp1").stat("8/plain", "init", "R 99") is None


def test_training_lowers_the_loss_and_ends_at_rate_zero() -> None:
    data = small_data()
    torch.manual_seed(0)
    training = Training(plain_mlp(1, 16, 3, inputs=6), Recipe(epochs=30, batch=8, rate=0.05), 0)
    before = evaluated(training.model, data.train)
    for _ in range(30):
        training.run_epoch(data.train)
    after = evaluated(training.model, data.train)
    assert after["loss"] < 0.7 * before["loss"]
    assert after["accuracy"] > before["accuracy"]
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_gradients_are_clipped() -> None:
    model = nn.Linear(6, 3)
    torch.manual_seed(0)
    before = model.weight.detach().clone()
    x, y = 1e4 * torch.randn(8, 6), torch.zeros(8, dtype=torch.int64)
    training = Training(model, Recipe(epochs=1, batch=8, rate=0.1, decay=0.0), 0)
    training.run_epoch(Split(x, y, lambda z, _: z))
    assert float((model.weight - before).norm()) <= 0.1 + 1e-6


def test_checkpoints_of_recipes() -> None:
    assert Recipe(epochs=50).checkpoints == {"init": 0, "mid": 25, "final": 50}
    assert Recipe(epochs=1).checkpoints == {"init": 0, "final": 1}
    assert Recipe(epochs=0).checkpoints == {"init": 0}


def test_pages_say_what_ran(tmp_path: Path) -> None:
    results = run(exp3b.EXPERIMENT, Options(out=tmp_path, init=True, seeds=[42]), False)
    page.write(exp3b.EXPERIMENT, results, tmp_path / "exp3b")
    html = (tmp_path / "exp3b" / "index.html").read_text(encoding="utf-8")
    for text in (
        html,
        (tmp_path / "exp3b" / "tables.md").read_text(encoding="utf-8"),
        page.as_report(exp3b.EXPERIMENT, results),
    ):
        assert "a stand-in: the paper has CIFAR" in text
        assert exp3.QUICK in text
        assert "1.967 ± 0.32" in text
    assert 'src="http' not in html and "href" not in html
    assert (tmp_path / "exp3b" / "exp3b.png").stat().st_size > 1000
    assert issubclass(ExperimentError, DagHesseError)
