"""``python -m bench gpu``: products and maps on a GPU, compared with double-backward, then timed beside functorch.

In this order, so that what a lack of time cuts off is the least: correctness on small models, products and maps at a
GPU's sizes, kernels. ``--compiled`` has the compiled products instead, ours and functorch's, a process a workload.
Without a GPU it runs on the CPU, at small sizes, which shows that it runs. Figures are of the card that the file is
named after.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend

import dag_hesse as dh
from bench import kernels
from bench.hvp import MATH, PROBES, Run, agreed, flat, fresh, operator_of, says, truth
from bench.peers import HESSIANS, Named
from bench.timing import RESULTS, interleaved, median, write_json
from bench.workloads import LARGE, WORKLOADS, Workload
from dag_hesse.measure import measured
from dag_hesse.sweep import replay

FACTS = ("sweeps", "seconds", "precision", "kernels that failed", "not recorded")
ROUNDS = 5
ANY: list[Any] = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
RECORDED = ("ours, amortized", "ours, GN and T apart")  # their memory is in the recording: see call by call
PEERS = ("functorch jvp∘grad", "double-backward", "double-backward, retained graph")
SMALL = ("MLP", "ResNet-18", "GPT-2")


@contextmanager
def call_by_call() -> Iterator[None]:
    """Sweeps that are made in here are not recorded."""
    os.environ[replay.SWITCH] = "0"
    try:
        yield
    finally:
        del os.environ[replay.SWITCH]


def _peers(work: Workload, v: Named) -> dict[str, Run]:
    """functorch's product and double-backward's, fresh and on a retained graph."""
    return {name: Run(HESSIANS[name](work, v), says) for name in PEERS}


def _ours(work: Workload, v: Named) -> dict[str, Run]:
    H, plain, anew = operator_of(work), *(operator_of(work, verify="none") for _ in range(2))
    with call_by_call():
        plain @ v

    return {
        "ours, amortized": Run(lambda: H @ v, says),
        "ours, amortized, call by call": Run(lambda: plain @ v, says),
        "ours, fresh": Run(lambda: fresh(anew, v), says),
        "ours, GN and T apart": Run(lambda: H.parts(v), lambda x: {"H": flat(x[0]) + flat(x[1])}),
    }


def _moved(work: Workload, device: str, dtype: torch.dtype) -> Workload:
    def to(x: Tensor) -> Tensor:
        return x.to(device, dtype if x.is_floating_point() else x.dtype)

    return Workload(work.model.to(device, dtype), to(work.x), to(work.y))


def _made(make: Callable[[], Workload], device: str, dtype: torch.dtype) -> tuple[Workload, Named]:
    """A workload and a vector, the same numbers in whatever type."""
    torch.manual_seed(0)
    work = _moved(make(), device, dtype)
    vector = {key: torch.randn_like(p, dtype=torch.float32) for key, p in work.model.named_parameters()}
    return work, {key: x.to(dtype) for key, x in vector.items()}


def correctness(name: str, device: str) -> Iterator[dict[str, Any]]:
    """Errors of all products of a small workload, in float64 and float32."""
    for dtype in (torch.float64, torch.float32):
        work, v = _made(WORKLOADS[name], device, dtype)
        with torch.nn.attention.sdpa_kernel(MATH):
            errors, unable = agreed(_ours(work, v) | _peers(work, v), truth(work, v, {}))
        yield {"workload": name, "dtype": str(dtype).removeprefix("torch."), "errors": errors, "unable": unable}


def products(name: str, make: Callable[[], Workload], device: str) -> dict[str, Any]:
    """A workload's products: errors against double-backward in float64, times in gradients, and peaks of memory.

    A gradient that may use fused attention, which has no second derivatives, has a row of its own.
    """
    with torch.nn.attention.sdpa_kernel(MATH):
        wide, u = _made(make, device, torch.float64)
        expected = {"H": flat(HESSIANS["double-backward"](wide, u)())}
        del wide, u
        work, v = _made(make, device, torch.float32)
        runs = _peers(work, v)
        torch.cuda.empty_cache() if device == "cuda" else None
        with measured(torch.device(device)) as made:
            ours = _ours(work, v)
        runs = ours | runs
        errors, unable = agreed(runs, expected)
        row: dict[str, Any] = {"workload": name, "errors": errors, "unable": unable, "three operators s": made.seconds}
        if any(key.startswith("ours") for key in unable):
            return row
        calls = {"gradient": work.gradient, **{k: run.call for k, run in runs.items() if k not in unable}}
        took = {key: median(found) for key, found in interleaved(calls, ROUNDS).items()}
        with torch.nn.attention.sdpa_kernel(ANY):
            took["gradient, attention fused"] = median(interleaved({"": work.gradient}, ROUNDS)[""])
        row["gradient s"] = took["gradient"]
        row["gradients"] = {key: value / took["gradient"] for key, value in took.items()}
        row["peak MiB"] = {key: _peak(call, device) for key, call in calls.items() if key not in RECORDED}
        row["gradients"] |= {f"ours, activations, {PROBES} at once": _activations(work) / took["gradient"]}
    return row


def _peak(call: Callable[[], Any], device: str) -> int:
    with measured(torch.device(device)) as memory:
        call()
    return memory.peak_bytes >> 20


def _activations(work: Workload) -> float:
    """Seconds of a product with several vectors in activation space, at the default points."""
    A = operator_of(work, space="activation", verify="none")
    z = {n: torch.randn(*shape, PROBES, device=work.x.device) for n, shape in zip(A.names, A.form.shapes, strict=True)}
    return median(interleaved({"": lambda: A @ z}, ROUNDS, warmup=3)[""])


def maps(name: str, make: Callable[[], Workload], device: str) -> dict[str, Any]:
    """Seconds of a whole map, the second one of two."""
    work, _ = _made(make, device, torch.float32)
    report, took = None, 0.0
    for _ in range(2):
        start = time.perf_counter()
        report = dh.analyze(work.model, (work.x, work.y), loss=F.cross_entropy)
        took = time.perf_counter() - start
    assert report is not None
    facts = {key: report.facts[key] for key in FACTS}
    return {"workload": name, "points": len(report.names), "seconds": took, "facts": facts}


def compiled(name: str, make: Callable[[], Workload], device: str, folder: Path) -> None:
    """Compiled products of a workload, ours and functorch's; processes beside this one are timed in turn."""
    work, v = _made(make, device, torch.float32)
    peer = "functorch jvp∘grad, torch.compile"
    row: dict[str, Any] = {"workload": name, "errors": {}, "seconds to compile": {}, "gradients": {}, "unable": {}}
    with torch.nn.attention.sdpa_kernel(MATH):
        C = operator_of(work, compile=True, verify="none")

        calls: dict[str, Callable[[], Named]] = {peer: HESSIANS[peer](work, v)}
        calls |= {"ours, compiled, amortized": lambda: C @ v, "ours, compiled, fresh": lambda: fresh(C, v)}
        expected = flat(operator_of(work, verify="none") @ v)
        for key, call in calls.items():
            start = time.perf_counter()
            try:
                off = float((flat(call()) - expected).norm() / expected.norm())
            except Exception as error:  # whatever a compiler raises is what the table says of it
                row["unable"][key] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            row["seconds to compile"][key], row["errors"][key] = time.perf_counter() - start, off
            with _turn(folder):
                took = interleaved({"gradient": work.gradient, key: call}, ROUNDS)
            row["gradients"][key] = median(took[key]) / median(took["gradient"])
            short = name.split()[0].strip(",").replace("/", "-")
            write_json(f"gpu/{_card()}-compiled-{short}", row, folder)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One process at a time."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


def _card() -> str:
    return torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"


def _table(row: dict[str, Any]) -> Table:
    table = Table(title=f"{row['workload']}: a gradient is {row['gradient s'] * 1e3:.1f} ms", title_justify="left")
    for column in ("H·v", "gradients", "peak MiB"):
        table.add_column(column, justify="left" if column == "H·v" else "right")
    for key, value in row["gradients"].items():
        table.add_row(key, f"{value:.2f}", str(row["peak MiB"].get(key, "")))
    return table


def main(quick: bool = False, folder: Path = RESULTS, minutes: float = 6) -> int:
    """Correctness, products, maps, kernels, as far as the time goes; print and write after every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # on by default, and then nobody's convolutions agree to 1e-4
    console, stop = Console(width=120), time.monotonic() + 60 * minutes
    found: dict[str, Any] = {"device": device, "correctness": [], "products": [], "maps": []}

    def keep(part: str, row: dict[str, Any]) -> None:
        found[part].append(row)
        write_json(f"gpu/{_card()}", found, folder)
        if device == "cuda":
            torch.cuda.empty_cache()

    for name in [n for n in WORKLOADS if n.startswith(SMALL[:1] if quick else SMALL)]:
        for row in correctness(name, device):
            keep("correctness", row)
            worst = max(off for key, off in row["errors"].items() if key.startswith("ours"))
            console.print(f"{name}, {row['dtype']}: ours are off by at most {worst:.1e}")
    large = LARGE if device == "cuda" else {name: WORKLOADS[name] for name in WORKLOADS if name.startswith("MLP")}
    for name, make in large.items() if not quick else [next(iter(large.items()))]:
        if time.monotonic() > stop:
            break
        keep("products", products(name, make, device))
        row = found["products"][-1]
        console.print(_table(row) if "gradients" in row else f"{name}: {row['unable']}")
    for name, make in large.items():
        if name.startswith("ResNet") and not quick and time.monotonic() < stop:
            keep("maps", maps(name, make, device))
            row = found["maps"][-1]
            console.print(f"map of {name}, {row['points']} points: {row['seconds']:.1f} s", row["facts"])
    wrong = [row for part in ("correctness", "products") for row in found[part]]
    names = [row["workload"] for row in wrong if any(key.startswith("ours") for key in row["unable"])]
    if names:
        print(f"products disagree: {names}", file=sys.stderr)
    return len(names) + kernels.main(folder, compile_until=None if quick else stop)


def main_compiled(folder: Path = RESULTS, only: str | None = None) -> int:
    """A process a workload, all at once: compilers take minutes."""
    torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if only is not None:
        compiled(only, LARGE[only], device, folder)
        return 0
    command = [sys.executable, "-m", "bench", "gpu", "--compiled", "--out", str(folder), "--only"]
    running = [subprocess.Popen([*command, name]) for name in LARGE]
    return sum(process.wait() != 0 for process in running)
