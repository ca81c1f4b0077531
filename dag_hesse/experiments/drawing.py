"""Figures: curves with error bars, ours as full lines and the paper's as crosses of the same colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dag_hesse.experiments.protocol import Findings
from dag_hesse.experiments.results import Stat
from dag_hesse.figures import new_figure


@dataclass(frozen=True)
class Curve:
    """Values over x, ours and the paper's; points without a value are left out."""

    label: str
    x: Sequence[float]
    ours: Sequence[Stat | None]
    paper: Sequence[Stat | None]
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """Curves on one pair of axes."""

    title: str
    curves: Sequence[Curve]
    xlabel: str
    ylabel: str
    log: bool = True
    logx: bool = False
    base: int = 2


def over_distance(findings: Findings, case: str, checkpoint: str, letter: str, label: str, style: str = "-") -> Curve:
    """A quantity whose name ends in a distance."""
    there = {
        int(name.removeprefix(f"{letter} "))
        for (own, _, when), cell in findings.ours.cells.items()
        if own == case and when == checkpoint
        for name in cell["values"]
        if name.startswith(f"{letter} ") and name.removeprefix(f"{letter} ").isdecimal()
    }
    x = sorted(there)
    ours, paper = (
        [each.stat(case, checkpoint, f"{letter} {d}") for d in x] for each in (findings.ours, findings.paper)
    )
    return Curve(label, x, ours, paper, style)


def draw(panels: Sequence[Panel], width: float = 4.2) -> Any:
    """Panels side by side, three in a row; those without a curve are left out."""
    panels = [panel for panel in panels if any(any(curve.ours) for curve in panel.curves)]
    columns = max(1, min(3, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = new_figure(figsize=(width * columns, 3.4 * rows))
    for k, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, k + 1)
        for number, curve in enumerate(panel.curves):  # one colour in all panels, though curves be missing
            _draw_curve(axes, curve, panel.log, f"C{number}")
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.xlabel)
        axes.set_ylabel(panel.ylabel)
        if panel.log:
            axes.set_yscale("log")
        if panel.logx:
            axes.set_xscale("log", base=panel.base)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    return figure


def _draw_curve(axes: Any, curve: Curve, log: bool, color: str) -> None:
    usable: Callable[[Stat | None], bool] = lambda stat: stat is not None and (stat.mean > 0 or not log)  # noqa: E731
    ours = [(x, stat) for x, stat in zip(curve.x, curve.ours, strict=True) if usable(stat)]
    paper = [(x, stat) for x, stat in zip(curve.x, curve.paper, strict=True) if usable(stat)]
    if not ours:
        return
    x, stats = zip(*ours, strict=True)
    bars = [stat.std or 0.0 for stat in stats]
    style: dict[str, Any] = {"fmt": f"o{curve.style}", "markersize": 3, "capsize": 2}
    axes.errorbar(x, [stat.mean for stat in stats], bars, label=curve.label, color=color, **style)
    if paper:
        x, stats = zip(*paper, strict=True)
        axes.plot(x, [stat.mean for stat in stats], "x", color=color, markersize=7, alpha=0.8)
