"""Pictures of a report (matplotlib, an optional extra)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dag_hesse.errors import OptionError, choose
from dag_hesse.estimate import METRICS
from dag_hesse.figures import check_figure, new_figure, save_figure
from dag_hesse.names import shortened
from dag_hesse.report.colour import spread
from dag_hesse.report.report import CurvatureReport

if TYPE_CHECKING:
    from dag_hesse.report.series import ReportSeries

TITLES = {
    "resonance": "Resonance  R = ‖H‖$_F$",
    "coupling": "Coupling  C",
    "stable_rank": "Stable rank  D",
    "gn_gap": "GN-gap  ‖H$_T$‖ / ‖H$_{GN}$‖",
    "gn_norm": "‖H$_{GN}$‖$_F$",
    "tensor_norm": "‖H$_T$‖$_F$",
}
_CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito's
_NAME = 30  # letters beside a map
_NUMBERS = 8  # points up to which cells hold numbers


def _short(value: float) -> str:
    """At most six characters."""
    if np.isnan(value):
        return "–"
    return (
        f"{value:.2g}"
        if value == 0 or 0.01 <= value < 1000
        else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    )


@dataclass(frozen=True)
class _Sheet:
    """Sizes in inches: cells that hold their numbers, or at least a line of their names; names beside them in full."""

    names: list[str]
    font: float  # points

    @classmethod
    def of(cls, report: CurvatureReport) -> _Sheet:
        count = len(report)
        return cls(shortened(report.names, _NAME), 8.0 if count <= 20 else 7.0 if count <= 40 else 6.0)

    @property
    def cell(self) -> float:
        count = len(self.names)
        return 0.46 if count <= _NUMBERS else max(1.3 * self.font / 72, 2.6 / count)

    @property
    def side(self) -> float:
        return self.cell * len(self.names)

    @property
    def label(self) -> float:
        return max(0.45, 0.12 + max(map(len, self.names)) * self.font * 0.62 / 72)


def heat_map(axes: Any, report: CurvatureReport, metric: str, sheet: _Sheet) -> Any:
    """Draw one metric as an n×n map; zero and undefined cells stay grey."""
    from matplotlib.colors import LogNorm, Normalize

    values = np.where(report.values[metric] > 0, report.values[metric], np.nan)
    low, high, log = spread(report.values[metric])
    norm = LogNorm(low, high) if log else Normalize(low, high)
    image = axes.pcolormesh(values, norm=norm, cmap="viridis", edgecolors="face", linewidth=0.1)
    axes.set(aspect="equal", xlim=(0, len(report)), ylim=(len(report), 0), facecolor="#dddddd")
    axes.set_title(TITLES[metric], fontsize=10)
    middles = np.arange(len(report)) + 0.5
    axes.set_xticks(middles, sheet.names, rotation=90, fontsize=sheet.font)
    axes.set_yticks(middles, sheet.names, fontsize=sheet.font)
    axes.tick_params(length=0)
    if len(report) <= _NUMBERS:
        for i, j in np.ndindex(values.shape):
            dark = np.isfinite(values[i, j]) and norm(values[i, j]) < 0.6
            text = _short(float(report.values[metric][i, j]))
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    return image


def against_distance(axes: Any, report: CurvatureReport, metric: str) -> None:
    """Draw one metric against graph distance: every pair with its standard error, and the mean of each distance."""
    rows, columns = np.triu_indices(len(report.points))
    distance, value = report.distance[rows, columns], report.values[metric][rows, columns]
    error = report.stderr[metric][rows, columns]
    some = (distance >= 0) & np.isfinite(value)
    drawn = {"fmt": "o", "ms": 3, "alpha": 0.6, "lw": 0.8, "color": _CYCLE[0], "label": "pairs"}
    axes.errorbar(distance[some], value[some], yerr=error[some], **drawn)
    steps = np.unique(distance[some])
    means = [value[some & (distance == d)].mean() for d in steps]
    axes.plot(steps, means, "-", lw=1.5, color=_CYCLE[1], label="mean")
    if spread(value[some])[2]:  # zeros are then out of sight
        axes.set_yscale("log")
        axes.minorticks_off()
    axes.set_xticks(steps[:: 1 + len(steps) // 12])
    axes.set_xlabel("distance", fontsize=8)
    axes.tick_params(labelsize=8)


def overview(report: CurvatureReport, metrics: Sequence[str], path: str | Path | None = None) -> Any:
    """A figure with a map per metric, and the metric against distance below.

    Raises:
        OptionError: ``metrics`` is no list of metrics' names, or ``path`` names no file of a kind that can be drawn.
    """
    if isinstance(metrics, str) or not isinstance(metrics, Sequence) or not metrics:
        raise OptionError(f"metrics={metrics!r}; expected a list of names among {', '.join(METRICS)}.")
    for metric in metrics:
        choose("metric", metric, METRICS)
    if path is not None:
        check_figure(path)
    facts = report.facts
    title = f"{facts['model']} · {facts['space']} space · batch {facts['batch_size']} ({facts['batch_mode']})"
    figure = _maps(report, metrics, 2.0, title)
    if path is not None:
        save_figure(figure, path)
    return figure


def heat_maps(report: CurvatureReport, metrics: Sequence[str]) -> Any:
    """A figure with the heat maps alone."""
    return _maps(report, metrics, 0.0, "")


def _maps(report: CurvatureReport, metrics: Sequence[str], below: float, title: str) -> Any:
    """Maps side by side, in two columns where they are large; ``below`` inches for what is under each."""
    sheet = _Sheet.of(report)
    columns = min(len(metrics), 2 if sheet.side > 3.5 else 4)
    rows = -(-len(metrics) // columns)
    wide, tall = sheet.label + sheet.side + 0.95, 0.4 + sheet.side + sheet.label + below
    width, height = wide * columns + 0.1, tall * rows + (0.4 if title else 0.05)
    figure = new_figure(figsize=(width, height), layout=None)

    def place(k: int, x: float, y: float, w: float, h: float) -> Any:
        """Axes in the k-th block, from its left and its top."""
        top = height - (0.4 if title else 0.05) - (k // columns) * tall - y
        return figure.add_axes(((k % columns * wide + x) / width, (top - h) / height, w / width, h / height))

    numbers = range(len(metrics))
    images = [heat_map(place(k, sheet.label, 0.3, sheet.side, sheet.side), report, metrics[k], sheet) for k in numbers]
    if below:
        for k in numbers:
            left = max(0.5, sheet.label)
            over = 0.3 + sheet.side + sheet.label + 0.15
            against_distance(place(k, left, over, sheet.side + sheet.label - left, below - 0.75), report, metrics[k])
    for k in numbers:
        bar = figure.colorbar(images[k], cax=place(k, sheet.label + sheet.side + 0.1, 0.3, 0.13, sheet.side))
        bar.solids.set(rasterized=False, edgecolor="face")  # a vector too
        bar.ax.tick_params(labelsize=8)
        bar.ax.tick_params(which="minor", labelsize=6)
    if title:
        figure.suptitle(title, fontsize=11, x=0.15 / width, y=1 - 0.1 / height, ha="left", va="top")
    return figure


def over_time(series: ReportSeries, metric: str, pairs: Sequence[tuple[int, int]]) -> Any:
    """A figure with a line per pair, in a band of two standard errors."""
    figure = new_figure(figsize=(6.4, 3.6))
    axes, names = figure.subplots(), shortened(series.names, _NAME)
    axes.set_prop_cycle(color=_CYCLE)
    values, errors = series[metric], series.stderr(metric)
    for i, j in pairs:
        value, error = values[:, i, j], 2 * errors[:, i, j]
        (line,) = axes.plot(
            series.steps, value, "o-", ms=3, lw=1.2, label=names[i] if i == j else f"{names[i]} – {names[j]}"
        )
        if error.any():
            axes.fill_between(series.steps, value - error, value + error, color=line.get_color(), alpha=0.2, lw=0)
    drawn = np.array([values[:, i, j] for i, j in pairs])
    if drawn.size and (drawn > 0).all() and spread(drawn)[2]:
        axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.set_title(TITLES[metric], fontsize=10)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)
    return figure
