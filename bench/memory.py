"""``python -m bench memory``: peak memory of one product, in peaks of the model's own gradient."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.timing import peak_bytes, write_json
from bench.workloads import WORKLOADS

SETUP = """
import torch, dag_hesse as dh
import torch.nn.functional as F
from bench.workloads import WORKLOADS
torch.manual_seed(0)
torch.backends.cuda.enable_flash_sdp(False)  # the fused attention has no double-backward
work = WORKLOADS[{name!r}]()
own = dict(work.model.named_parameters())
v = {{k: torch.randn_like(p) for k, p in own.items()}}
work.gradient()
"""
MAKE = "H = dh.HessianOperator(work.model, (work.x, work.y), loss=F.cross_entropy)\n"
OURS = f"{MAKE}H @ v\n{MAKE}"  # warm, but with nothing kept
KEPT = "first = torch.autograd.grad(work.value(), list(own.values()), create_graph=True)"
# What is kept from one product to the next (a linearization, a graph) is counted.
RUNS = {
    "gradient": "run = work.gradient",
    "ours": OURS + "run = lambda: H @ v",
    "double-backward, retained graph": (
        f"def run():\n    {KEPT}\n"
        "    return torch.autograd.grad(first, list(own.values()), list(v.values()), retain_graph=True), first"
    ),
}


def main() -> int:
    """Measure, print and write."""
    table, rows = Table("workload", *RUNS, title="Peak memory, in gradients", title_justify="left"), []
    for name in WORKLOADS:
        setup = SETUP.format(name=name)
        peaks = {key: peak_bytes(f"{setup}\n{code}") for key, code in RUNS.items()}
        ratios = {key: value / peaks["gradient"] for key, value in peaks.items()}
        rows.append({"workload": name, "bytes": peaks, "gradients": ratios})
        table.add_row(name, f"{peaks['gradient'] / 2**20:.0f} MiB", *(f"{r:.2f}" for r in list(ratios.values())[1:]))
    Console(width=140).print(table)
    write_json("memory", {"workloads": rows})
    return 0
