"""``python -m bench profile``: what the plan predicts of linearization and sweep, against what they take."""

from __future__ import annotations

import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import dag_hesse as dh
from bench.timing import peak_bytes, write_json
from bench.workloads import WORKLOADS

SETUP = """
import torch, dag_hesse as dh
import torch.nn.functional as F
from bench.workloads import WORKLOADS
torch.manual_seed(0)
work = WORKLOADS[{name!r}]()
H = dh.HessianOperator(work.model, (work.x, work.y), loss=F.cross_entropy, space="activation")
v = torch.randn(H.shape[0])
H.parts(v)
H._problem.arena.retire()
"""
# Memory is measured in a process of its own, where freed memory goes back at once.
RUNS = {
    "linearize": "H.refresh()\nrun = lambda: next(iter(H._problem.linearizations()))",
    "sweep": "run = lambda: H.parts(v)",
}


def main() -> int:
    """Measure, print and write."""
    table, rows = (
        Table("workload", "phase", "ms", "predicted", "peak MiB", "predicted", title="One probe, all points"),
        [],
    )
    for name, make in WORKLOADS.items():
        work = make()
        found = dh.profile(work.model, (work.x, work.y), loss=F.cross_entropy)
        for phase, code in RUNS.items():
            seconds, predicted = found.phases[phase].seconds, found.predicted[phase]
            peak = peak_bytes(SETUP.format(name=name) + code)
            rows.append(
                {
                    "workload": name,
                    "phase": phase,
                    "seconds": seconds,
                    "seconds predicted": predicted.seconds,
                    "bytes": peak,
                    "bytes predicted": predicted.peak_bytes,
                }
            )
            cells = (seconds * 1e3, predicted.seconds * 1e3, peak / 2**20, predicted.peak_bytes / 2**20)
            table.add_row(name, phase, *(f"{cell:.0f}" for cell in cells))
    Console(width=120).print(table)
    write_json("profile", {"rows": rows})
    return 0
