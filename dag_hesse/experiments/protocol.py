"""What an experiment consists of: cases that are built, trained and measured, and what is said about the results."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dag_hesse.experiments.data import Data
from dag_hesse.experiments.measure import Batch, Values
from dag_hesse.experiments.results import Published, Results, Stat, deviation
from dag_hesse.experiments.training import Recipe

SEEDS = (42, 43, 44, 45, 46)


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        name: as published figures name it.
        build: makes the model; the seed is set before.
        measure: of the model in evaluation mode and the batch that curvature is taken on.
        samples: how many of the first test samples that batch has.
        recipe: how it is trained.
        data: what it is trained and measured on, where that is not the experiment's.
    """

    name: str
    build: Callable[[], nn.Module]
    measure: Callable[[nn.Module, Batch], Values]
    samples: int = 32
    recipe: Recipe = field(default_factory=Recipe)
    data: Data | None = None


@dataclass(frozen=True)
class Row:
    """A quantity of a case at a checkpoint: ours, and the paper's."""

    labels: tuple[str, ...]
    ours: Stat | None
    paper: Stat | None

    @property
    def deviation(self) -> float | None:
        """In standard deviations of the paper's."""
        return deviation(self.ours, self.paper)


@dataclass(frozen=True)
class Table:
    """Rows under a title; ``heads`` names their labels, ``against`` what ours is held against (None: nothing)."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    against: str | None = "paper"


@dataclass(frozen=True)
class Claim:
    """A statement, of the paper or foretold, what was found, and whether that bears it out; None: not measured."""

    text: str
    found: str
    holds: bool | None


def _line(each: Results | Published, case: str, checkpoint: str, letter: str) -> tuple[float, float] | None:
    stats = itertools.takewhile(bool, (each.stat(case, checkpoint, f"{letter} {d}") for d in itertools.count()))
    logs = np.log([stat.mean for stat in stats if stat])
    if len(logs) < 2:
        return None
    x = np.arange(len(logs))
    slope, start = np.polyfit(x, logs, 1)
    return float(slope), float(1 - ((logs - slope * x - start) ** 2).sum() / ((logs - logs.mean()) ** 2).sum())


@dataclass(frozen=True)
class Findings:
    """Ours and the paper's, side by side."""

    ours: Results
    paper: Published

    def cases(self, fits: str = "*") -> list[str]:
        """Those that were measured, in order, whose name a glob fits."""
        return [
            case for case in dict.fromkeys(case for case, _, _ in self.ours.cells) if fnmatch.fnmatchcase(case, fits)
        ]

    def row(self, case: str, checkpoint: str, quantity: str, *labels: str) -> Row:
        """Both figures of one quantity; labels are those three unless others are given."""
        both = (each.stat(case, checkpoint, quantity) for each in (self.ours, self.paper))
        return Row(labels or (case, checkpoint, quantity), *both)

    def table(
        self,
        title: str,
        cases: Sequence[str],
        quantities: Sequence[str],
        checkpoints: Sequence[str] | None = None,
        note: str = "",
        against: str | None = "paper",
    ) -> Table:
        """A row per case, checkpoint and quantity that was measured."""
        rows = [
            self.row(case, when, quantity)
            for case in cases
            for when in (checkpoints or self.ours.checkpoints)
            for quantity in quantities
        ]
        return Table(
            title, ("case", "when", "quantity"), tuple(row for row in rows if row.ours is not None), note, against
        )

    def both(self, cases: Sequence[str], checkpoint: str, quantity: str) -> tuple[list[Stat | None], list[Stat | None]]:
        """One quantity of several cases: ours, and the paper's."""
        ours, paper = ([each.stat(case, checkpoint, quantity) for case in cases] for each in (self.ours, self.paper))
        return ours, paper

    def line(self, case: str, checkpoint: str, letter: str) -> tuple[tuple[float, float] | None, ...]:
        """Slope and R² of the line through log of the mean at each distance: ours, and the paper's."""
        return tuple(_line(each, case, checkpoint, letter) for each in (self.ours, self.paper))

    def all(self, cases: Sequence[str], checkpoint: str, quantity: str) -> list[float]:
        """Values of all seeds of several cases."""
        return [value for case in cases for value in self.ours.values(case, checkpoint, quantity)]


@dataclass(frozen=True)
class Experiment:
    """One of the paper's, or one beyond it.

    Attributes:
        name, title, section: where it stands in the paper, or what of it is taken up.
        data: from the folder with CIFAR, or from none.
        cases: of the full protocol (True) or of the quick one.
        quick: what the quick one leaves out.
        tables, claims, figures: of what was found; figures by name of the file.
        remarks: what is known about differences.
        paper: whether the full protocol is the paper's.
    """

    name: str
    title: str
    section: str
    data: Callable[[Path | None], Data]
    cases: Callable[[bool], list[Case]]
    quick: str
    tables: Callable[[Findings], list[Table]]
    claims: Callable[[Findings], list[Claim]]
    figures: Callable[[Findings], dict[str, Any]]
    remarks: tuple[str, ...] = ()
    paper: bool = True
