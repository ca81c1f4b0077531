"""Runs an experiment: every case, seed and checkpoint once, written down as it is measured, taken up where it ended."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dag_hesse.errors import ExperimentError, OptionError, integer
from dag_hesse.experiments.data import Data
from dag_hesse.experiments.protocol import SEEDS, Case, Experiment
from dag_hesse.experiments.results import Results, versions
from dag_hesse.experiments.training import Training, evaluated
from dag_hesse.files import check_output, write_whole
from dag_hesse.progress import Report, shown
from dag_hesse.randomness import preserved

_SAVED = 60.0  # seconds after which a training that goes on is written down


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        full: the paper's protocol, instead of the quick one.
        data: the folder with CIFAR; None: a stand-in.
        seeds: None: all five, or the first two in the quick protocol.
        out: folder that a folder of the experiment's name is made in.
        resume: go on with what is there.
        init: measure at initialization only.
        cases: globs over the names of cases.
        epochs: train for so many at most; the learning rate then falls to zero over these. None: as the protocol says.
    """

    full: bool = False
    data: Path | None = None
    seeds: Sequence[int] | None = None
    out: Path = Path("experiments-report")
    resume: bool = False
    init: bool = False
    cases: Sequence[str] = ("*",)
    epochs: int | None = None


def run(experiment: Experiment, options: Options, progress: Report | bool | None = None) -> Results:
    """Train and measure what is not there yet.

    Results are in ``results.json`` of the experiment's folder, written anew after every cell. A training that is under
    way is in ``states``; one that is taken up goes on bit by bit as if it had not been interrupted.

    Raises:
        OptionError: a seed is no integer, or no case has such a name.
        ExperimentError: there are results, and ``resume`` is False, or they are of another run.
        DagHesseError: from data or measurement.
    """
    seeds = chosen_seeds(options)
    cases = chosen_cases(experiment, options)
    folder = options.out / experiment.name
    check_place(folder, options)
    data = experiment.data(options.data)
    results = opened(folder, experiment, data, options)
    results.versions = versions()
    todo = [
        (case, seed, missing)
        for case in cases
        for seed in seeds
        if (missing := _missing(results, case, seed, options.init or not data.trainable))
    ]
    total, done = sum(len(missing) for *_, missing in todo), 0
    with shown(progress, "checkpoints") as told:
        for case, seed, missing in todo:
            for when in _one(case, seed, missing, data, results, folder, told):
                done += 1
                if told is not None:
                    told(f"{experiment.name}: {case.name}, seed {seed}, {when}", done, total)
    return results


def chosen_seeds(options: Options) -> list[int]:
    """Checked, each once."""
    default = SEEDS if options.full else SEEDS[:2]
    return list(dict.fromkeys(integer("seeds", seed, 0) for seed in (options.seeds or default)))


def chosen_cases(experiment: Experiment, options: Options) -> list[Case]:
    """Those that a glob fits, trained as long as is asked for."""
    known = experiment.cases(options.full)
    if options.epochs is not None:
        most = integer("epochs", options.epochs, 1, "--init trains nothing")
        known = [replace(c, recipe=replace(c.recipe, epochs=min(most, c.recipe.epochs))) for c in known]
    found = [case for case in known if any(fnmatch.fnmatchcase(case.name, glob) for glob in options.cases)]
    if not found:
        names = ", ".join(case.name for case in known)
        raise OptionError(f"--cases {' '.join(options.cases)} fits none of {experiment.name}'s: {names}.")
    return found


def check_place(folder: Path, options: Options) -> None:
    """Refuse to write over results, to put a folder where a file is, or where nothing may be written."""
    for place in (options.out, folder):
        if place.exists() and not place.is_dir():
            raise OptionError(f"--out: {place} is no folder.")
    check_output(folder / "results.json")
    if (folder / "results.json").exists() and not options.resume:
        raise ExperimentError(f"{folder} has results already: add --resume to go on with them, or take another --out.")


def opened(folder: Path, experiment: Experiment, data: Data, options: Options) -> Results:
    """Results to go on with, or none yet."""
    header: dict[str, Any] = {
        "experiment": experiment.name,
        "protocol": "full" if options.full else "quick",
        "data": {"name": data.name, "note": data.note, "digest": data.digest},
    }
    if options.epochs is not None:
        header["epochs"] = options.epochs
    path = folder / "results.json"
    if not path.exists():
        return Results(header)
    found = Results.read(path)
    different = [key for key in {**header, **found.header} if found.header.get(key) != header.get(key)]
    known = {case.name for case in experiment.cases(options.full)}
    different += sorted({f"cases: '{case}'" for case, _, _ in found.cells if case not in known})
    if different:
        raise ExperimentError(
            f"{path} is of another run ({', '.join(f'other {key}' for key in different)}): take another --out."
        )
    return found


def _missing(results: Results, case: Case, seed: int, init: bool) -> dict[str, int]:
    wanted = {"init": 0} if init else case.recipe.checkpoints
    return {when: epoch for when, epoch in wanted.items() if (case.name, seed, when) not in results.cells}


def _one(
    case: Case, seed: int, missing: dict[str, int], data: Data, results: Results, folder: Path, told: Report | None
) -> Iterator[str]:
    """Train one model as far as the last missing checkpoint; yields checkpoints as they are measured."""
    data = case.data or data
    state = folder / "states" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', case.name)}-{seed}.pt"
    made_by = f"{results.header} {case.recipe}"
    training = _begun(case, seed, state, made_by, min(missing.values()))
    at = {epoch: when for when, epoch in missing.items()}
    spent, saved = 0.0, time.perf_counter()
    while True:
        if when := at.pop(training.epoch, None):
            start = time.perf_counter()
            values = _measured(case, training, data)
            seconds = {"train": round(spent, 3), "measure": round(time.perf_counter() - start, 3)}
            results.cells[case.name, seed, when] = {"epoch": training.epoch, "values": values, "seconds": seconds}
            results.write(folder / "results.json")
            spent = 0.0
            yield when
        if not at:
            break
        start = time.perf_counter()
        with preserved():
            training.run_epoch(data.train)
        spent += time.perf_counter() - start
        if told is not None:
            told(f"{case.name}, seed {seed}: epochs", training.epoch, case.recipe.epochs)
        if training.epoch in at or time.perf_counter() - saved > _SAVED:
            saved = time.perf_counter()
            write_whole(state, lambda place: torch.save({"made by": made_by, **training.state()}, place))
    if training.epoch >= case.recipe.epochs:
        state.unlink(missing_ok=True)


def _begun(case: Case, seed: int, state: Path, made_by: str, before: int) -> Training:
    """At its initialization, or as a state left it that is of the same run and not after an epoch."""
    with preserved():
        torch.manual_seed(seed)
        training = Training(case.build(), case.recipe, seed)
    if state.exists():
        found = torch.load(state, weights_only=True)
        if found.pop("made by") == made_by and found["epoch"] <= before:
            training.take_up(found)
    return training


def _measured(case: Case, training: Training, data: Data) -> dict[str, float]:
    with preserved():
        training.model.eval()
        values = case.measure(training.model, data.test.batch(slice(0, case.samples)))
        return values | evaluated(training.model, data.test)
