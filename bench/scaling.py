"""``python -m bench scaling``: how one product grows with depth, batch, probes and points; fits printed and drawn.

And how much faster two processes are than one (:mod:`bench.ranks`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dag_hesse as dh
from bench import ranks
from bench.timing import RESULTS, interleaved, median, write_json
from dag_hesse.experiments.models import mlp

WIDTH = 256
GRIDS = {"depth": (1, 2, 4, 8, 16, 32, 64), "batch": (64, 128, 256, 512, 1024), "probes": (1, 2, 4, 8, 16, 32)}
GRIDS["points"] = GRIDS["points at once"] = GRIDS["depth"]


def _chain(depth: int, batch: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model with its batch. Signals keep their size in it: sums of denormal numbers would be timed otherwise."""
    torch.manual_seed(0)
    model = mlp([WIDTH] * (depth + 1) + [10], nn.SiLU)
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=(3 / WIDTH) ** 0.5)
    return model, (torch.randn(batch, WIDTH), torch.arange(batch) % 10)


def _operator(depth: int, batch: int) -> dh.HessianOperator:
    return dh.HessianOperator(*_chain(depth, batch), loss=F.cross_entropy)


def _product(operator: dh.HessianOperator, probes: int = 1) -> Callable[[], Any]:
    v = torch.randn(probes, operator.shape[0]).T
    return partial(operator.__matmul__, v)


def _run(axis: str, value: int) -> Callable[[], Any]:
    if axis == "depth":
        return _product(_operator(value, 256))
    if axis == "batch":
        return _product(_operator(8, value))
    if axis == "probes":
        return _product(_operator(8, 256), value)
    # Activations spread evenly over a chain: one probe of all of them, or a probe from each, read at all.
    names = [f"{2 * (64 * k // value) + 1}" for k in range(value)]
    operator = dh.HessianOperator(*_chain(64, 256), loss=F.cross_entropy, space="activation", points=names)
    if axis == "points at once":
        return _product(operator)
    vectors = torch.randn(value, 1, WIDTH) * torch.eye(value)[:, :, None]
    return lambda: [operator @ v.flatten() for v in vectors]


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(slope, intercept, R²) of the least-squares line."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = ((y - slope * x - intercept) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return float(slope), float(intercept), float(1 - rest)


def main() -> int:
    """Measure, print, draw and write."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, figure = {}, plt.figure(figsize=(11, 2.8), layout="constrained")
    table = Table("axis", "from", "to", "ms a unit", "ms at zero", "R²", title="H·v, MLP of width 256")
    for place, (axis, grid) in enumerate(GRIDS.items()):
        runs = {str(value): _run(axis, value) for value in grid}
        seconds = interleaved(runs, 7, warmup=2)
        x, y = np.array(grid, float), np.array([median(seconds[str(value)]) for value in grid]) * 1e3
        slope, intercept, r2 = fit(x, y)
        rows[axis] = {"grid": grid, "ms": y.tolist(), "slope": slope, "intercept": intercept, "r2": r2}
        table.add_row(axis, str(grid[0]), str(grid[-1]), f"{slope:.3f}", f"{intercept:.2f}", f"{r2:.4f}")
        axes = figure.add_subplot(1, len(GRIDS), place + 1)
        axes.plot(x, y, "o", x, slope * x + intercept, "-")
        axes.set(xlabel=axis, title=f"R² = {r2:.3f}", ylabel="ms" if place == 0 else "")
    of_ranks = ranks.measured(_chain)
    console = Console(width=100)
    console.print(table)
    console.print(_ranks_table(of_ranks))
    figure.savefig(RESULTS / "scaling.png", dpi=120)
    write_json("scaling", {"axes": rows, "ranks": of_ranks})
    return 0


def _ranks_table(found: dict[str, Any]) -> Table:
    table = Table(
        "axis", "ms of one", "ms of two", "efficiency", "predicted", title="H·v by gloo processes of one thread"
    )
    for axis in ("data", "probe"):
        row = found[axis]
        times = [f"{ms:.2f}" for ms in row["ms"]]
        table.add_row(axis, *times, f"{row['efficiency']:.0%}", f"{row['predicted']:.0%}")
    return table
