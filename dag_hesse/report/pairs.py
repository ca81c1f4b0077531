"""Reports taken apart: a pair's figures, and tables of all pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dag_hesse.errors import DependencyError
from dag_hesse.estimate import METRICS

if TYPE_CHECKING:
    from dag_hesse.report.report import CurvatureReport

TITLES = {
    "resonance": ("R", "‖H‖_F"),
    "coupling": ("C", "coupling"),
    "stable_rank": ("D", "stable rank"),
    "gn_gap": ("GN-gap", "‖H_T‖/‖H_GN‖"),
    "gn_norm": ("GN", "‖H_GN‖_F"),
    "tensor_norm": ("T", "‖H_T‖_F"),
}  # a metric's symbol, and what it is


def number(value: float, error: float, method: str) -> str:
    """``1.23e-2 ±4%`` for an estimate, ``1.23e-2`` for an exact value, ``0`` for a structural zero."""
    if method == "zero" and not isnan(value):
        return "0"
    if isnan(value):
        return "-"
    shown = f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"
    if not (error > 0 and value):
        return shown
    share = error / abs(value)
    return f"{shown} ±{share:.0%}" if share >= 0.005 else f"{shown} ±<0.5%"


class Reading(NamedTuple):
    """A number of a report, its standard error (0.0 where exact), and how it was obtained."""

    value: float
    stderr: float
    method: str

    def __str__(self) -> str:
        return number(*self)

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Pair:
    """What a report says of two points.

    Attributes:
        v, w: their names.
        distance: points passed on the way between them; -1 if they never meet.
        rank_bound: per-sample bound on the rank of the GN part.
        resonance, coupling, stable_rank, gn_gap, gn_norm, tensor_norm: the metrics.
    """

    v: str
    w: str
    distance: int
    rank_bound: int
    resonance: Reading
    coupling: Reading
    stable_rank: Reading
    gn_gap: Reading
    gn_norm: Reading
    tensor_norm: Reading

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {getattr(self, name)}" for name in METRICS)
        return f"{self.v} – {self.w} (distance {self.distance}): {figures}"


def pair_of(report: CurvatureReport, i: int, j: int) -> Pair:
    """The figures of two points, by number."""
    figures = {
        name: Reading(
            float(report.values[name][i, j]), float(report.stderr[name][i, j]), str(report.method[name][i, j])
        )
        for name in METRICS
    }
    names = report.names
    return Pair(names[i], names[j], int(report.distance[i, j]), int(report.rank_bound[i, j]), **figures)


def rows_of(report: CurvatureReport) -> list[dict[str, Any]]:
    """A row per pair of points (v before w), and per metric its value, standard error and method."""
    found = []
    for i, j in zip(*np.triu_indices(len(report.points)), strict=True):
        pair = pair_of(report, int(i), int(j))
        row: dict[str, Any] = {"v": pair.v, "w": pair.w, "distance": pair.distance, "rank_bound": pair.rank_bound}
        for name in METRICS:
            row[name], row[f"{name}_stderr"], row[f"{name}_method"] = getattr(pair, name)
        found.append(row)
    return found


def data_frame(rows: Iterable[dict[str, Any]]) -> Any:
    """A pandas DataFrame.

    Raises:
        DependencyError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise DependencyError(
            "to_dataframe() needs pandas: pip install 'dag-hesse[pandas]', or take rows()."
        ) from error
    return pandas.DataFrame(list(rows))
