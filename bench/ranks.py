"""Two processes against one, at fixed work: time of products, and what the formulas of :mod:`bench.predict_ranks` need.

Both processes have one thread. They stay alive through all rounds; while one multiplies alone, the other sleeps.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh

import dag_hesse as dh
from bench.predict_ranks import Costs, Link, Work, predicted
from bench.timing import median

RANKS = 2
Chain = Callable[[int, int], tuple[nn.Module, tuple[Tensor, Tensor]]]  # from depth and batch to a model with its batch


@dataclass(frozen=True)
class Size:
    """What is multiplied.

    Attributes:
        depth: of the model.
        data, probe: (samples, vectors) along either axis; the vectors of the latter make two chunks or more.
        rounds: of which the median counts.
    """

    depth: int = 8
    data: tuple[int, int] = (1024, 1)
    probe: tuple[int, int] = (256, 64)
    rounds: int = 7


def measured(chain: Chain, size: Size = Size()) -> dict[str, Any]:
    """Per axis milliseconds of 1 and 2 processes, the efficiency t₁ / (2 t₂), and the one that is predicted."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (folder, chain, size), nprocs=RANKS)
        found = json.loads(Path(folder, "found").read_text())
    seconds = {name: median(values) for name, values in found["seconds"].items()}
    link, rows = _link(seconds, found["length"]), {}
    for axis in ("data", "probe"):
        samples, vectors = getattr(size, axis)
        one, several = seconds[f"{axis}, 1"], seconds[f"{axis}, {RANKS}"]
        costs = _costs(axis, (samples, vectors), seconds, found)
        work = Work(samples, vectors, found["chunks"][axis])
        rows[axis] = {
            "grid": [1, RANKS],
            "ms": [one * 1e3, several * 1e3],
            "efficiency": one / (RANKS * several),
            "predicted": predicted(costs, link, work, RANKS, axis).efficiency,
            "work": asdict(work),
            "costs": asdict(costs),
        }
    return {**rows, "link": asdict(link)}


def _link(seconds: dict[str, float], length: int) -> Link:
    """From all-reduces of one number and of a vector, between two ranks."""
    latency = seconds["one number"] / 2
    return Link(latency, 4 * length / max(seconds["a vector"] - 2 * latency, 1e-9))


def _costs(axis: str, work: tuple[int, int], seconds: dict[str, float], found: dict[str, Any]) -> Costs:
    """Of one process: along ``data`` from all and half of the samples, along ``probe`` from the mean of the vectors."""
    (samples, vectors), one = work, seconds[f"{axis}, 1"]
    sample = 2 * (one - seconds["half"]) / samples if axis == "data" else one / samples / vectors
    fixed = max(0.0, one - samples * sample) if axis == "data" else 0.0
    linearize = max(0.0, seconds["fresh"] - seconds["data, 1"]) / work[0] if axis == "data" else 0.0
    return Costs(sample, fixed, linearize, found["length"], found["segments"])


def _rank(rank: int, folder: str, chain: Chain, size: Size) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    try:
        found = _timed(rank, chain, size)
        if rank == 0:
            Path(folder, "found").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def _timed(rank: int, chain: Chain, size: Size) -> dict[str, Any]:
    """Seconds of every round, of what one process does alone and of what both do."""
    alone, both, chunks = {}, {}, {}
    for axis in ("data", "probe"):
        samples, vectors = getattr(size, axis)
        model, (x, y) = chain(size.depth, samples)
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=(axis,))
        part = slice(rank * samples // RANKS, (rank + 1) * samples // RANKS) if axis == "data" else slice(None)
        one = dh.HessianOperator(model, (x, y), loss=F.cross_entropy)
        several = dh.HessianOperator(model, (x[part], y[part]), loss=F.cross_entropy, mesh=mesh)
        v = torch.randn(vectors, one.shape[0], generator=torch.Generator().manual_seed(0)).T
        alone[f"{axis}, 1"], both[f"{axis}, {RANKS}"] = partial(one.__matmul__, v), partial(several.__matmul__, v)
        chunks[axis] = several.chunk
        if axis == "data":
            half = dh.HessianOperator(model, (x[: samples // 2], y[: samples // 2]), loss=F.cross_entropy)
            alone |= {"half": partial(half.__matmul__, v), "fresh": partial(_fresh, one, v)}
    length = one.shape[0]
    both |= {"one number": partial(_reduced, torch.ones(1)), "a vector": partial(_reduced, torch.ones(length))}
    seconds: dict[str, list[float]] = {name: [] for name in (*alone, *both)}
    for k in range(2 + size.rounds):
        for name, run in (*alone.items(), *both.items()):
            dist.barrier()
            start = time.perf_counter()
            if rank == 0 or name in both:
                run()
            if k >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds, "chunks": chunks, "length": length, "segments": len(one.names)}


def _fresh(operator: dh.HessianOperator, v: Tensor) -> None:
    operator.release()
    operator @ v


def _reduced(x: Tensor) -> None:
    dist.all_reduce(x)


__all__ = ["RANKS", "Size", "measured"]
