"""``python -m bench monitor [NAME …]``: what a measurement of a monitor costs, in training steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dag_hesse as dh
from bench.timing import median, write_json
from bench.workloads import WORKLOADS, Workload
from dag_hesse.monitor import demo
from dag_hesse.monitor.quantities import QUANTITIES, Moment, Numbers

AGREED = 1e-3  # difference of curvature along the update from double-backward, beside ‖Hu‖, at which no time is printed
_MEASURED = 4  # measurements, of which the first starts without eigenvectors


def _digits(name: str) -> Workload:
    images, labels = demo.digits()
    return Workload(demo.MODELS[name](), images[:64], labels[:64])


CASES: dict[str, tuple[Callable[[], Workload], str]] = {
    "resnet18-relu": (WORKLOADS["ResNet-18 ReLU, B=32, 32²"], "sgd"),
    "resnet18-silu": (WORKLOADS["ResNet-18 SiLU, B=32, 32²"], "sgd"),
    "gpt2": (WORKLOADS["GPT-2 4×256, B=4, S=128"], "adam"),
    "cnn": (lambda: _digits("cnn"), "sgd"),
    "cnn-adam": (lambda: _digits("cnn"), "adam"),
    "mlp-adam": (lambda: _digits("mlp"), "adam"),
}


def _off(work: Workload, before: list[Tensor], found: float) -> float:
    """How far curvature along the update is from double-backward's, beside the length of Hu."""
    parameters = list(work.model.parameters())
    d = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
    size = torch.stack([x.norm() for x in d]).norm()
    u = [x / size for x in d]
    flags = [(module, module.training) for module in work.model.modules()]
    work.model.eval()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative in autograd
        first = torch.autograd.grad(work.value(), parameters, create_graph=True)
    image = torch.autograd.grad(sum((g * x).sum() for g, x in zip(first, u, strict=True)), parameters)
    for module, flag in flags:
        module.training = flag
    expected = sum(float((x.double() * y).sum()) for x, y in zip(image, u, strict=True))
    return abs(found - expected) / float(torch.stack([x.norm() for x in image]).norm())


def _timed(seconds: dict[str, list[float]], name: str) -> Callable[[Moment], Numbers]:
    run = QUANTITIES[name]

    def timed(at: Moment) -> Numbers:
        start = time.perf_counter()
        found = run(at)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return found

    return timed


def _step(work: Workload, optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(work.model(work.x), work.y).backward()
    optimizer.step()
    return time.perf_counter() - start


def _run(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    make, kind = CASES[name]
    work = make()
    work.model.train()
    parameters = work.model.parameters()
    sgd = torch.optim.SGD(parameters, 0.01, momentum=0.9) if kind == "sgd" else None
    optimizer = sgd or torch.optim.Adam(parameters)
    steps, seconds = [_step(work, optimizer) for _ in range(5)][1:], dict[str, list[float]]()
    start = time.perf_counter()
    monitor = dh.Monitor(work.model, (work.x, work.y), every=1, optimizer=optimizer, loss=F.cross_entropy)
    capture, off = time.perf_counter() - start, 0.0
    with mock.patch.dict(QUANTITIES, {each: _timed(seconds, each) for each in monitor.quantities}):
        for number in range(_MEASURED):
            before = [p.detach().clone() for p in work.model.parameters()]
            steps.append(_step(work, optimizer))
            metrics = monitor.step(number)
            assert metrics is not None and not monitor.failures, monitor.failures
            if number:
                off = max(off, _off(work, before, metrics["curvature/update"]))
    unit = median(steps)
    parts = {each: median(found[1:]) / unit for each, found in seconds.items()}
    whole = {"capture": capture / unit, "together": sum(parts.values())}
    return {"case": name, "optimizer": kind, "batch": len(work.x), "step_seconds": unit, "off": off} | whole | parts


def main(wanted: Sequence[str]) -> int:
    """Run the cases, print and write what they cost; 1 where a number is wrong."""
    cases = [name for name in CASES if not wanted or any(text in name for text in wanted)]
    rows = [_run(name) for name in cases]
    bad = [row["case"] for row in rows if not row["off"] <= AGREED]
    columns = [*QUANTITIES, "together", "capture"]
    table = Table("case", "batch", "step", *columns, "off")
    for row in rows:
        costs = [f"{row[name]:.1f}" if name in row and row["case"] not in bad else "–" for name in columns]
        table.add_row(row["case"], str(row["batch"]), f"{row['step_seconds']:.3g} s", *costs, f"{row['off']:.0e}")
    Console(width=140).print(table)
    write_json("monitor", {"threads": torch.get_num_threads(), "rows": [r for r in rows if r["case"] not in bad]})
    return int(bool(bad))
