"""Timing by turns in one process, and facts of the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dag_hesse.files import write_text

RESULTS = Path(__file__).parent / "results"


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every run in every round; the runs take turns, so that drift of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(warmup + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if k >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def device_seconds(run: Callable[[], Any], rounds: int = 5, repeats: int = 5) -> float:
    """Median of what a call takes on the GPU alone: calls are recorded one behind another, and replayed."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    found = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop) / repeats / 1e3)
    return median(found)


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def spread(values: list[float]) -> float:
    """Half the range between the quartiles, over the median."""
    if len(values) < 2:
        return float("nan")
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / median(values)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    return {
        "cpu": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),  # processors of one name may differ in them
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_json(name: str, data: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Write ``data`` with the machine's facts to ``<name>.json`` in ``bench/results``, or another folder."""
    text = json.dumps({"machine": machine(), **data}, indent=1, ensure_ascii=False)
    write_text(folder / f"{name}.json", text + "\n")


def peak_bytes(code: str) -> int:
    """Growth of memory, at its peak, while ``run()`` of ``code`` runs in a process of its own.

    ``code`` defines ``run``; what it does at its top level (imports, building the model, a warm-up) is not counted.
    """
    program = (
        f"{code}\nimport gc\nfrom dag_hesse.measure import measured\ngc.collect()\n"
        "with measured() as phase:\n    found = run()\nprint(phase.peak_bytes)\n"
    )
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"a measurement failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])
