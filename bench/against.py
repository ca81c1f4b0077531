"""``python -m bench against CHECKOUT``: another checkout of the project and this one, turn by turn, product by product.

Each checkout is served by a process of its own environment (``make .venv/test`` there); both run the workloads of this
checkout. A figure is the median over rounds of this checkout's time over the other's in the same round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import dag_hesse as dh
from bench.hvp import TOLERANCE, flat
from bench.timing import median, spread, write_json
from bench.workloads import WORKLOADS

ROOT = Path(__file__).parents[1]
PROBES = 8
ROUNDS, FEW = 11, 5  # few of what takes a second
_SERVE = "import sys, dag_hesse; sys.path.append(sys.argv[1]); from bench.against import serve; serve()"


class Checkout:
    """A process that runs one checkout's code."""

    def __init__(self, root: Path) -> None:
        python, elsewhere = root.resolve() / ".venv/bin/python", tempfile.gettempdir()
        if not python.exists():
            raise SystemExit(f"{root} has no environment of its own: run `make -C {root} .venv/test` first.")
        command = [str(python), "-c", _SERVE, str(ROOT)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=elsewhere
        )

    def ask(self, *words: str) -> Any:
        """What the process answers to a command of :func:`serve`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of a checkout ended with status {self._process.wait()}.")
        return json.loads(line)


def _calls(name: str) -> dict[str, Callable[[], Any]]:
    """What is timed of a workload."""
    torch.manual_seed(0)
    work = WORKLOADS[name]()
    batch = (work.x, work.y)
    v = {key: torch.randn_like(p) for key, p in work.model.named_parameters()}
    many = {key: torch.randn(*x.shape, PROBES) for key, x in v.items()}
    H = dh.HessianOperator(work.model, batch, loss=F.cross_entropy)
    A = dh.HessianOperator(work.model, batch, loss=F.cross_entropy, space="activation")
    form: Any = vars(A).get("form") or vars(A)["layout"]  # as older checkouts call it
    z = {key: torch.randn(*shape, PROBES) for key, shape in zip(A.names, form.shapes, strict=True)}

    def fresh() -> Any:
        H.refresh()
        return H @ v

    return {
        "gradient": work.gradient,
        "amortized": lambda: H @ v,
        "fresh": fresh,
        f"{PROBES} at once": lambda: H @ many,
        f"activations, {PROBES} at once": lambda: A @ z,
        "construction": lambda: dh.HessianOperator(work.model, batch, loss=F.cross_entropy).shape,
    }


def serve() -> None:
    """Answer commands, one a line: ``["workload", name]``, ``["product", call, path]``, ``["time", call]``,
    ``["bits"]``.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    calls: dict[str, Callable[[], Any]] = {}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for line in sys.stdin:
            command, *words = json.loads(line)
            answer: Any = None
            if command == "workload":
                calls = _calls(words[0])
                answer = list(calls)
            elif command == "bits":
                from bench.bits import digests

                answer = digests()
            elif command == "product":
                found = calls[words[0]]()
                torch.save(flat(found) if isinstance(found, dict) else torch.zeros(1), words[1])
            else:
                start = time.perf_counter()
                calls[words[0]]()
                answer = time.perf_counter() - start
            print(json.dumps(answer), file=answers, flush=True)


def _difference(checkouts: Sequence[Checkout], call: str) -> float:
    """Between the two checkouts' products, relative; exactly 0 where they are equal to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{k}.pt" for k in range(2)]
        for checkout, path in zip(checkouts, paths, strict=True):
            checkout.ask("product", call, path)
        theirs, ours = map(torch.load, paths)
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def _seconds(checkouts: Sequence[Checkout], call: str) -> list[list[float]]:
    found: list[list[float]] = [[], []]
    rounds = FEW if checkouts[0].ask("time", call) > 1 else ROUNDS
    for k in range(rounds + 1):
        for place in (0, 1) if k % 2 else (1, 0):
            time.sleep(0.02)  # the other process's threads have stopped waiting for work
            seconds = checkouts[place].ask("time", call)
            if k:
                found[place].append(seconds)
    return found


def compare_bits(other: str) -> int:
    """Print which products over the tests' models are not equal to the bit; return how many."""
    theirs, ours = (Checkout(root).ask("bits") for root in (Path(other), ROOT))
    unequal = [name for name in ours if theirs.get(name) != ours[name]]
    print(f"{len(ours) - len(unequal)} of {len(ours)} products are equal to the bit", *unequal, sep="\n")
    return len(unequal)


def main(other: str, only: Sequence[str] = ()) -> int:
    """Compare products with each other, then time; print, and write ``bench/results/against.json``."""
    checkouts = [Checkout(Path(other)), Checkout(ROOT)]
    console, rows = Console(width=110), []
    for name in [n for n in WORKLOADS if not only or any(part in n for part in only)]:
        calls = [checkout.ask("workload", name) for checkout in checkouts][1]
        off = max(_difference(checkouts, call) for call in calls)
        if not off <= TOLERANCE:
            print(f"{name}: products differ by {off:.1e}, so no speed is printed", file=sys.stderr)
            return 1
        table = Table(title=f"{name}: products differ by {off:.0e}", title_justify="left")
        for column in ("", "other ms", "this ms", "this / other", "±"):
            table.add_column(column, justify="right")
        for call in calls:
            theirs, ours = _seconds(checkouts, call)
            ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
            rows.append({"workload": name, "call": call, "off": off, "other s": median(theirs), "this s": median(ours)})
            rows[-1] |= {"ratio": median(ratios), "spread": spread(ratios)}
            cells = (median(theirs) * 1e3, median(ours) * 1e3, median(ratios), spread(ratios))
            table.add_row(call, *(f"{cell:.{d}f}" for cell, d in zip(cells, (1, 1, 3, 3), strict=True)))
        console.print(table)
        write_json("against", {"rows": rows})
    return 0
