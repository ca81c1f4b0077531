"""Pictures of a report (matplotlib, an optional extra)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dag_hesse.errors import DependencyError, OptionError, choose
from dag_hesse.estimate import METRICS
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
_LOG = ("resonance", "gn_norm", "tensor_norm", "gn_gap")


def new_figure(**options: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError("plots need matplotlib: pip install 'dag-hesse[plot]'.") from error
    return Figure(layout="constrained", **options)


def _short(value: float) -> str:
    """At most six characters."""
    if np.isnan(value):
        return "–"
    return (
        f"{value:.2g}"
        if value == 0 or 0.01 <= value < 1000
        else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    )


def heat_map(axes: Any, report: CurvatureReport, metric: str) -> None:
    """Draw one metric as an n×n map; zero and undefined cells stay grey."""
    from matplotlib.colors import LogNorm, Normalize

    values = np.where(report.values[metric] > 0, report.values[metric], np.nan)
    finite = values[np.isfinite(values)]
    log = metric in _LOG and finite.size > 0 and finite.max() > 20 * finite.min()
    norm = LogNorm(finite.min(), finite.max()) if log else Normalize(0, finite.max() if finite.size else 1)
    image = axes.imshow(values, norm=norm, cmap="viridis")
    axes.set_facecolor("#dddddd")
    axes.set_title(TITLES[metric], fontsize=10)
    ticks = range(len(report.names))
    axes.set_xticks(ticks, report.names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(ticks, report.names, fontsize=8)
    if len(report.names) <= 8:
        for i in ticks:
            for j in ticks:
                value = report.values[metric][i, j]
                text = _short(value)
                dark = np.isfinite(values[i, j]) and norm(values[i, j]) < 0.6
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def against_distance(axes: Any, report: CurvatureReport, metric: str) -> None:
    """Draw one metric against graph distance: every pair with its standard error, and the mean of each distance."""
    rows, columns = np.triu_indices(len(report.points))
    distance, value = report.distance[rows, columns], report.values[metric][rows, columns]
    error = report.stderr[metric][rows, columns]
    some = (distance >= 0) & np.isfinite(value)
    axes.errorbar(distance[some], value[some], yerr=error[some], fmt="o", ms=3, alpha=0.6, lw=1, label="pairs")
    steps = np.unique(distance[some])
    axes.plot(steps, [value[some & (distance == d)].mean() for d in steps], "-", lw=1.5, label="mean")
    if (value[some] > 0).all() and metric in _LOG and some.any():
        axes.set_yscale("log")
    axes.set_xticks(steps)
    axes.set_xlabel("distance", fontsize=8)
    axes.set_title(TITLES[metric], fontsize=10)
    axes.tick_params(labelsize=8)


def overview(report: CurvatureReport, metrics: Sequence[str]) -> Any:
    """A figure with one column per metric: heat map above, metric against distance below.

    Raises:
        OptionError: ``metrics`` is no list of metrics' names.
    """
    if isinstance(metrics, str) or not isinstance(metrics, Sequence) or not metrics:
        raise OptionError(f"metrics={metrics!r}; expected a list of metrics' names.")
    for metric in metrics:
        choose("metric", metric, METRICS)
    side = max(3.2, 0.42 * len(report.names))
    figure = new_figure(figsize=(side * len(metrics) + 0.6, side + 3.0))
    grid = figure.subplots(2, len(metrics), squeeze=False, height_ratios=[side, 2.2])
    for k, metric in enumerate(metrics):
        heat_map(grid[0, k], report, metric)
        against_distance(grid[1, k], report, metric)
    facts = report.facts
    figure.suptitle(
        f"{facts['model']} · {facts['space']} space · batch {facts['batch_size']} ({facts['batch_mode']})", fontsize=11
    )
    return figure


def heat_maps(report: CurvatureReport, metrics: Sequence[str]) -> Any:
    """A figure with the heat maps alone, in one row."""
    side = max(3.2, 0.42 * len(report.names))
    figure = new_figure(figsize=(side * len(metrics) + 0.6, side))
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        heat_map(axes, report, metric)
    return figure


def over_time(series: ReportSeries, metric: str, pairs: Sequence[tuple[int, int]]) -> Any:
    """A figure with a line per pair, in a band of two standard errors."""
    figure = new_figure(figsize=(6.4, 3.6))
    axes, names = figure.subplots(), series.names
    values, errors = series[metric], series.stderr(metric)
    for i, j in pairs:
        value, error = values[:, i, j], 2 * errors[:, i, j]
        (line,) = axes.plot(
            series.steps, value, "o-", ms=3, lw=1.2, label=names[i] if i == j else f"{names[i]} – {names[j]}"
        )
        if error.any():
            axes.fill_between(series.steps, value - error, value + error, color=line.get_color(), alpha=0.2, lw=0)
    drawn = np.array([values[:, i, j] for i, j in pairs])
    if metric in _LOG and drawn.size and (drawn > 0).all() and drawn.max() > 20 * drawn.min():
        axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.set_title(TITLES[metric], fontsize=10)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)
    return figure
