"""``python -m bench memory``: peak memory of one product, in peaks of the model's own gradient."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.timing import peak_bytes, write_json
from bench.workloads import WORKLOADS

SMALL = ("MLP", "ResNet-18 SiLU", "ResNet-50, B=8, 64²", "GPT-2")
SETUP = """
import torch, dag_hesse as dh
import torch.nn.functional as F
from bench.workloads import WORKLOADS
torch.manual_seed(0)
work = WORKLOADS[{name!r}]()
own = dict(work.model.named_parameters())
v = {{k: torch.randn_like(p) for k, p in own.items()}}
work.gradient()
"""
OURS = "H = dh.HessianOperator(work.model, (work.x, work.y), loss=F.cross_entropy)\n"
RUNS = {
    "gradient": "run = work.gradient",
    "ours, fresh (the linearization counted)": OURS + "run = lambda: H @ v",
    "double-backward, fresh (its graph counted)": (
        "def run():\n"
        "    first = torch.autograd.grad(work.value(), list(own.values()), create_graph=True)\n"
        "    return torch.autograd.grad(first, list(own.values()), list(v.values()), retain_graph=True), first"
    ),
}


def main() -> int:
    """Measure, print and write."""
    table, rows = Table("workload", *RUNS, title="Peak memory, in gradients", title_justify="left"), []
    for name in WORKLOADS:
        if not name.startswith(SMALL):
            continue
        setup = SETUP.format(name=name)
        peaks = {key: peak_bytes(f"{setup}\n{code}") for key, code in RUNS.items()}
        ratios = {key: value / peaks["gradient"] for key, value in peaks.items()}
        rows.append({"workload": name, "bytes": peaks, "gradients": ratios})
        table.add_row(name, f"{peaks['gradient'] / 2**20:.0f} MiB", *(f"{r:.2f}" for r in list(ratios.values())[1:]))
    Console(width=140).print(table)
    write_json("memory", {"workloads": rows})
    return 0
