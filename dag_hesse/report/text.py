"""The report as text: facts, one map a metric, and what was estimated."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dag_hesse.report.report import CurvatureReport

_TITLES = {
    "resonance": "R  ‖H‖_F",
    "coupling": "C  coupling",
    "stable_rank": "D  stable rank",
    "gn_gap": "GN-gap  ‖H_T‖/‖H_GN‖",
}


def number(value: float, error: float, method: str) -> str:
    """``1.23e-2 ±4%`` for an estimate, ``1.23e-2`` for an exact value, ``0`` for a structural zero."""
    if method == "zero" and not np.isnan(value):
        return "0"
    if np.isnan(value):
        return "-"
    shown = f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"
    return f"{shown} ±{error / abs(value):.0%}" if error > 0 and value else shown


def _table(report: CurvatureReport, metric: str) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for name in report.names:
        table.add_column(name, justify="right", no_wrap=True)
    values, errors, methods = report.values[metric], report.stderr[metric], report.method[metric]
    for i, name in enumerate(report.names):
        cells = [number(values[i, j], errors[i, j], str(methods[i, j])) for j in range(len(report.names))]
        table.add_row(name, *cells)
    return table


def facts(report: CurvatureReport) -> list[str]:
    """The lines above the maps."""
    f = report.facts
    counts = {m: int((report.method["resonance"] == m).sum()) for m in ("exact", "gram", "probes", "zero")}
    used = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    lines = [
        f"{f['model']}: {len(report.points)} {f['space']} points, loss {f['loss']:.4g}, "
        f"batch {f['batch_size']} ({f['batch_mode']})",
        f"blocks: {used}; {f['sweeps']} sweeps; {f['seconds']['total']:.2f} s",
    ]
    if f["space"] == "parameter" and len(report.points) > 1:
        lines.append(f"Φ = {report.phi:.4f} of ‖H‖² lies outside the diagonal blocks")
    if f.get("reduction", "one batch") != "one batch":
        lines.append(f"loss: {f['reduction']}")
    if f["opaque"]:
        lines.append(f"opaque ops (differentiated by autograd, exact): {', '.join(f['opaque'])}")
    lines += [f"batch axis lost at {where}" for where in f.get("lost", ())]
    return lines


def render(report: CurvatureReport, width: int | None = None) -> str:
    """The whole report as plain text; ± gives the relative standard error of an estimate."""
    parts: list[Text | Table] = [Text(line) for line in facts(report)]
    for metric, title in _TITLES.items():
        parts += [Text(""), Text(title), _table(report, metric)]
    buffer = io.StringIO()
    wide = width or 24 + 16 * (len(report.points) + 1)
    Console(file=buffer, width=wide, color_system=None, legacy_windows=False).print(Group(*parts))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
