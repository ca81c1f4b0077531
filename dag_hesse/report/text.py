"""The report as text: facts, one map a metric, and what was estimated."""

from __future__ import annotations

from math import isnan

import numpy as np
from rich.cells import cell_len

from dag_hesse.names import shortened
from dag_hesse.plan import Method
from dag_hesse.report.pairs import TITLES, number
from dag_hesse.report.report import CurvatureReport

_SHOWN = ("resonance", "coupling", "stable_rank", "gn_gap")
_NAME = 40  # terminal cells of a name beside a map
_HEAD = 24  # and above one


def cells(report: CurvatureReport, metric: str) -> list[list[tuple[str, str]]]:
    """n×n pairs of a number as text and its method."""
    grids = (report.values[metric], report.stderr[metric], report.method[metric])
    rows = zip(*(grid.tolist() for grid in grids), strict=True)  # numbers of Python are formatted faster
    return [[(number(*cell), cell[2]) for cell in zip(*row, strict=True)] for row in rows]


def _table(report: CurvatureReport, metric: str) -> list[str]:
    """A map as lines, a row and a column per point."""
    names, heads = shortened(report.names, _NAME), shortened(report.names, _HEAD)
    columns = [
        [name, *(text for text, _ in column)]
        for name, column in zip(heads, zip(*cells(report, metric), strict=True), strict=True)
    ]
    first = max(map(cell_len, names), default=0)
    padded = [[name + " " * (first - cell_len(name)) for name in ("", *names)]]
    for column in columns:
        width = max(cell_len(column[0]), *map(len, column[1:]))
        padded.append([" " * (width - cell_len(column[0])) + column[0], *(text.rjust(width) for text in column[1:])])
    head, *rows = zip(*padded, strict=True)
    rule = "━╇━".join("━" * cell_len(cell) for cell in head)
    return [" ┃ ".join(head), rule, *(" │ ".join(row) for row in rows)]


def _left_out(report: CurvatureReport, metric: str) -> bool:
    """Whether there is not one value of it, as it was not asked for."""
    return bool((report.method[metric] == "skipped").any() and np.isnan(report.values[metric]).all())


def facts(report: CurvatureReport) -> list[str]:
    """The lines above the maps."""
    f = report.facts
    counts = {m: int((report.method["resonance"] == m).sum()) for m in Method}
    used = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    lines = [
        f"{f['model']}: {len(report.points)} {f['space']} points, loss {f['loss']:.4g}, "
        f"batch {f['batch_size']} ({f['batch_mode']})",
        f"blocks: {used}; {f['sweeps']} sweeps; {f['seconds']['total']:.2f} s",
    ]
    if f["space"] == "parameter" and len(report.points) > 1 and not isnan(report.phi):
        lines.append(f"Φ = {report.phi:.4f} of ‖H‖² lies outside the diagonal blocks")
    if f.get("reduction", "one batch") != "one batch":
        lines.append(f"loss: {f['reduction']}")
    if f["opaque"]:
        lines.append(f"opaque ops (differentiated by autograd, exact): {', '.join(f['opaque'])}")
    if f.get("dtype") in ("bfloat16", "float16"):
        lines.append(f"computed in {f['dtype']}; norms are added up in more")
    if f.get("precision"):
        lines.append(f"precision: {f['precision']}")
    if f.get("loss function"):
        lines.append(f"loss function: {f['loss function']}")
    if f.get("one point"):
        lines.append(f"one point: {f['one point']}")
    lines += [f"left out: kernel {which}" for which in f.get("kernels that failed", ())]
    lines += [f"sweeps were launched one by one: {why}" for why in f.get("not recorded", ())]
    lines += [f"batch axis lost at {where}" for where in f.get("lost", ())]
    lines += f.get("whole", ())
    return lines


def render(report: CurvatureReport) -> str:
    """The whole report as plain text; ± gives the relative standard error of an estimate."""
    lines = facts(report)
    for metric in (m for m in _SHOWN if not _left_out(report, m)):
        lines += ["", "  ".join(TITLES[metric]), *_table(report, metric)]
    return "\n".join(line.rstrip() for line in lines)
