"""What was measured, cell by cell, beside what the paper's authors published."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dag_hesse import __version__
from dag_hesse.errors import ExperimentError, is_integer
from dag_hesse.files import write_text

Key = tuple[str, int, str]  # case, seed, checkpoint


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation over seeds (of the population, as in the paper); ``std`` is None where unknown."""

    mean: float
    std: float | None
    count: int = 5

    @classmethod
    def of(cls, values: Iterable[float]) -> Stat | None:
        """Of the values that are numbers; None where there are none."""
        known = [value for value in values if not math.isnan(value)]
        return cls(float(np.mean(known)), float(np.std(known)), len(known)) if known else None


def deviation(ours: Stat | None, paper: Stat | None) -> float | None:
    """(ours − paper) in standard deviations of the paper's; None where that has no meaning.

    It has none where ours is exactly zero for all seeds: the published number is then float32's rounding.
    """
    if ours is None or paper is None or not paper.std or (ours.mean == 0 and ours.std == 0):
        return None
    return (ours.mean - paper.mean) / paper.std


@dataclass(frozen=True)
class Published:
    """The authors' figures: by case, checkpoint and quantity."""

    source: str
    cases: Mapping[str, Mapping[str, Mapping[str, Any]]]

    @classmethod
    def of(cls, name: str) -> Published:
        """Of an experiment, from the package's data; none where it is not one of the paper's."""
        file = resources.files(__package__).joinpath("published", f"{name}.json")
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else cls("", {})

    def stat(self, case: str, checkpoint: str, quantity: str) -> Stat | None:
        """None where nothing was published."""
        found = self.cases.get(case, {}).get(checkpoint, {}).get(quantity)
        return None if found is None else Stat(*found)


@dataclass
class Results:
    """Cells of a run: values by case, seed and checkpoint, and what the run was.

    Attributes:
        header: experiment, protocol, data; two runs with different ones are different runs.
        cells: values, and seconds spent.
        versions: of what computed the last of them.
    """

    header: dict[str, Any]
    cells: dict[Key, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def values(self, case: str, checkpoint: str, quantity: str) -> list[float]:
        """One number a seed."""
        return [
            cell["values"][quantity]
            for (own, _, when), cell in self.cells.items()
            if own == case and when == checkpoint and quantity in cell["values"]
        ]

    def stat(self, case: str, checkpoint: str, quantity: str) -> Stat | None:
        """None where nothing was measured."""
        return Stat.of(self.values(case, checkpoint, quantity))

    @property
    def seeds(self) -> list[int]:
        """All that there are."""
        return sorted({seed for _, seed, _ in self.cells})

    @property
    def checkpoints(self) -> list[str]:
        """In the order of training."""
        found = {when for _, _, when in self.cells}
        return [when for when in ("init", "mid", "final") if when in found]

    @property
    def seconds(self) -> float:
        """Of training and measuring."""
        return float(sum(sum(cell["seconds"].values()) for cell in self.cells.values()))

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all; a NaN is null."""
        rows = [
            {"case": case, "seed": seed, "checkpoint": when, **cell, "values": _plain(cell["values"])}
            for (case, seed, when), cell in self.cells.items()
        ]
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
        head = json.dumps({**self.header, "versions": self.versions}, indent=1)[:-2]
        write_text(path, f'{head},\n "cells": [\n{lines}\n]}}\n')

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read back what :meth:`write` wrote.

        Raises:
            ExperimentError: the file is something else.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rows = [_cell(row) for row in data.pop("cells")]
            if len(dict(rows)) < len(rows):
                raise ValueError("a case, seed and checkpoint is there twice")
            return cls({k: v for k, v in data.items() if k != "versions"}, dict(rows), dict(data["versions"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExperimentError(
                f"{path} does not hold an experiment's results ({error}): take another --out."
            ) from error


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _cell(row: dict[str, Any]) -> tuple[Key, dict[str, Any]]:
    """What was written of one.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is something else.
    """
    case, seed, when = row.pop("case"), row.pop("seed"), row.pop("checkpoint")
    values = {name: math.nan if value is None else value for name, value in row["values"].items()}
    fits = isinstance(case, str) and is_integer(seed) and isinstance(when, str) and is_integer(row["epoch"])
    if not fits or not values or not all(isinstance(value, (int, float)) for value in values.values()):
        raise ValueError(f"of case {case!r}, seed {seed!r}, checkpoint {when!r}")
    return (case, seed, when), {**row, "values": values}


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "dag-hesse": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }
