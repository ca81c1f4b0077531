"""``python -m bench gpu``: products on a GPU, first compared with double-backward, then timed beside functorch.

Every figure is of the card that the file is named after. Without a GPU it runs on the CPU, which shows that it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dag_hesse as dh
from bench import kernels
from bench.hvp import Named, Run, agreed, flat, theirs, truth
from bench.timing import interleaved, median, write_json
from bench.workloads import WORKLOADS, Workload
from dag_hesse.measure import measured

ROUNDS = 7
QUICK = ("MLP", "ResNet-18 ReLU")


def _peers(work: Workload, v: Named) -> dict[str, Callable[[], Named]]:
    """functorch's product and double-backward's, fresh and on a retained graph."""
    own = dict(work.model.named_parameters())
    params = {name: p.detach() for name, p in own.items()}
    vectors = [v[name] for name in own]

    def named(values: Any) -> Named:
        return dict(zip(own, values, strict=True))

    def fresh() -> Named:
        first = torch.autograd.grad(work.value(), list(own.values()), create_graph=True)
        return named(torch.autograd.grad(first, list(own.values()), vectors))

    kept = torch.autograd.grad(work.value(), list(own.values()), create_graph=True)
    return {
        "functorch jvp∘grad": lambda: torch.func.jvp(torch.func.grad(work.functional), (params,), (v,))[1],
        "double-backward": fresh,
        "double-backward, retained graph": lambda: named(
            torch.autograd.grad(kept, list(own.values()), vectors, retain_graph=True)
        ),
    }


def _ours(work: Workload, v: Named) -> dict[str, Run]:
    H = dh.HessianOperator(work.model, (work.x, work.y), loss=F.cross_entropy)

    def fresh() -> Named:
        H.refresh()
        return H @ v

    return {
        "ours, amortized": Run(lambda: H @ v, lambda x: {"H": flat(x)}),
        "ours, fresh": Run(fresh, lambda x: {"H": flat(x)}),
        "ours, GN and T apart": Run(lambda: H.parts(v), lambda x: {"H": flat(x[0]) + flat(x[1])}),
    }


def _moved(work: Workload, device: str, dtype: torch.dtype) -> Workload:
    def to(x: Tensor) -> Tensor:
        return x.to(device, dtype if x.is_floating_point() else x.dtype)

    return Workload(work.model.to(device, dtype), to(work.x), to(work.y))


def _row(name: str, device: str, dtype: torch.dtype, timed: bool) -> dict[str, Any]:
    """Errors of one workload in one dtype, and its times where all of ours agree."""
    torch.manual_seed(0)
    work = _moved(WORKLOADS[name](), device, dtype)
    v = {key: torch.randn_like(p) for key, p in work.model.named_parameters()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), measured(torch.device(device)) as memory:
        runs = _ours(work, v) | theirs(_peers(work, v), "H")
        errors, unable = agreed(runs, truth(work, v, {}))
        row: dict[str, Any] = {"workload": name, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"errors": errors, "unable": unable}
        if timed and not any(key.startswith("ours") for key in unable):
            calls = {"gradient": work.gradient, **{k: run.call for k, run in runs.items() if k not in unable}}
            seconds = {key: median(found) for key, found in interleaved(calls, ROUNDS).items()}
            row["gradient s"] = seconds["gradient"]
            row["gradients"] = {key: value / seconds["gradient"] for key, value in seconds.items()}
    row["peak MiB, all products"] = memory.peak_bytes >> 20
    return row


def main(quick: bool = False) -> int:
    """Correctness in float64 and float32, then times in float32; print and write after every workload."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # on by default, and then nobody's convolutions agree to 1e-4
    card = torch.cuda.get_device_name().replace(" ", "-") if device == "cuda" else "cpu"
    console, rows = Console(width=120), list[dict[str, Any]]()
    for name in [n for n in WORKLOADS if not quick or n.startswith(QUICK)]:
        for dtype in (torch.float64, torch.float32):
            rows.append(_row(name, device, dtype, dtype is torch.float32))
            write_json(f"gpu/{card}", {"device": device, "workloads": rows})
            worst = max(off for key, off in rows[-1]["errors"].items() if key.startswith("ours"))
            console.print(f"{name}, {rows[-1]['dtype']}: ours are off by at most {worst:.1e}")
        if "gradients" in rows[-1]:
            table = Table(title=f"one gradient is {rows[-1]['gradient s'] * 1e3:.1f} ms", title_justify="left")
            table.add_column("H·v")
            table.add_column("gradients", justify="right")
            for key, value in rows[-1]["gradients"].items():
                table.add_row(key, f"{value:.2f}")
            console.print(table)
    wrong = [f"{row['workload']}, {row['dtype']}" for row in rows if any(k.startswith("ours") for k in row["unable"])]
    if wrong:
        print(f"products disagree: {wrong}", file=sys.stderr)
    return len(wrong) + kernels.main()
