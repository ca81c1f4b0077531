"""From structure and options to a schedule: which pairs by which method, from which source, reading what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dag_hesse.errors import BatchCouplingError, MemoryBudgetError, choose
from dag_hesse.ir import CurvatureGraph
from dag_hesse.measure import available_memory
from dag_hesse.plan.cost import Cost, path_cost
from dag_hesse.plan.memory import probe_chunk, sweep_bytes
from dag_hesse.structure import Structure

METHODS = ("zero", "gram", "exact", "probes")
MODES = ("auto", "exact", "gram", "probes")
BATCH_MODES = ("shared", "per_sample", "joint")
_GRAM_ROWS = 4096
SPECTRAL_STEPS = (
    5  # Golub–Kahan steps that a pair's spectral norm takes, as a rule; each is a product and its transpose
)


@dataclass(frozen=True, slots=True)
class Source:
    """Sweeps from one point: ``probes`` of them, read at ``reads`` (point indices)."""

    point: int
    method: str  # "exact" or "probes"
    probes: int
    reads: tuple[int, ...]
    flops: float
    bytes: float


@dataclass(frozen=True)
class Plan:
    """The schedule. ``method`` (n×n) is how the full block's norm is obtained, ``gn_method`` that of its GN part.

    ``gram_columns`` are the reverse sweeps of the Gram route (0: not taken), ``spectral_cost`` what spectral norms of
    sampled pairs take as a rule. ``chunk`` is the number of probes swept together, ``peak_bytes`` the predicted memory
    of one such sweep and of what is kept between sweeps, but for the linearization.
    """

    structure: Structure
    method: NDArray[np.str_]
    gn_method: NDArray[np.str_]
    tensor_method: NDArray[np.str_]
    sources: tuple[Source, ...]
    gram_columns: int
    gram_cost: Cost
    spectral_cost: Cost
    chunk: int
    peak_bytes: int

    @property
    def flops(self) -> float:
        """Predicted FLOPs of all sweeps."""
        return self.gram_cost.flops + self.spectral_cost.flops + sum(source.flops for source in self.sources)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        names = self.structure.names
        rows = [{**asdict(s), "point": names[s.point], "reads": [names[k] for k in s.reads]} for s in self.sources]
        return {
            "points": list(names),
            "method": self.method.tolist(),
            "gn_method": self.gn_method.tolist(),
            "sources": rows,
            "gram_columns": self.gram_columns,
            "spectral_flops": self.spectral_cost.flops,
            "flops": self.flops,
            "chunk": self.chunk,
            "peak_bytes": self.peak_bytes,
        }

    def __str__(self) -> str:
        names = self.structure.names
        width = max(len(name) for name in names)
        lines = [
            f"plan: {self.flops / 1e9:.2f} GFLOP, {self.chunk} probes a sweep, {self.peak_bytes / 2**20:.0f} MiB peak"
        ]
        if self.gram_columns:
            lines.append(
                f"gram: {self.gram_columns} reverse sweeps, {self.gram_cost.flops / 1e9:.2f} GFLOP, all points"
            )
        for s in self.sources:
            reads = ", ".join(names[k] for k in s.reads)
            lines.append(
                f"{names[s.point]:<{width}}  {s.method:<6} {s.probes:>6} probes  {s.flops / 1e9:>9.2f} GFLOP"
                f"  reads {reads}"
            )
        if self.spectral_cost.flops:
            lines.append(
                f"spectral norms: about {2 * SPECTRAL_STEPS} products a sampled pair, "
                f"{self.spectral_cost.flops / 1e9:.2f} GFLOP"
            )
        return "\n".join(lines)


def sweep_cost(structure: Structure, source: int, reads: Iterable[int]) -> Cost:
    """Of one probe at point ``source``, read at points ``reads``: ahead once, back once or (with a T channel) twice."""
    graph = structure.graph
    ahead = path_cost(graph, graph.points[source].sites)
    back = path_cost(graph, [site for v in reads for site in graph.points[v].sites])
    return ahead + back * (2 if structure.tensor_alive[source].any() else 1)


def _dims(graph: CurvatureGraph, batch_mode: str) -> list[int]:
    whole = batch_mode == "joint" and not graph.separable
    return [graph.nodes[p.sites[0]].numel if whole and p.kind == "activation" else p.dim for p in graph.points]


def _gram_columns(graph: CurvatureGraph, batch_mode: str) -> tuple[int, int]:
    """(reverse sweeps, rows of S) that the Gram route needs."""
    size = sum(graph.nodes[k].numel for k in graph.out)
    if not graph.separable_loss:
        return size, size
    columns = size // graph.batch_size
    unbatched = any(p.kind == "parameter" or any(graph.layouts[k] is None for k in p.sites) for p in graph.points)
    alone = graph.separable and not unbatched
    return (columns if alone else size), size


def _nested_out(graph: CurvatureGraph) -> bool:
    return any(graph.descendants([a])[b] for a in graph.out for b in graph.out if a != b)


def _want_gram(
    graphs: Sequence[CurvatureGraph],
    dims: list[int],
    mode: str,
    batch_mode: str,
    probes: int,
    budget: int,
    itemsize: int,
) -> bool:
    if mode in ("exact", "probes") or any(_nested_out(graph) for graph in graphs):
        return False
    after_out = graphs[0].loss_subgraph
    if any(after_out[k] or k in graphs[0].out for p in graphs[0].points for k in p.sites):
        return False  # a point inside the loss has no Jacobian from out
    counted = [_gram_columns(graph, batch_mode) for graph in graphs]
    rows = sum(r for _, r in counted)
    held = rows * sum(dims) * itemsize + 8 * rows * rows * len(dims)
    if mode == "gram":
        return True
    # A reverse sweep costs half of a probe's; exactness is worth a few probes more.
    affordable = sum(c for c, _ in counted) <= 8 * probes * len(graphs)
    return affordable and rows <= _GRAM_ROWS and held <= budget


def _check_exact(
    names: Sequence[str], dims: list[int], pairs: list[tuple[int, int]], itemsize: int, groups: int, budget: int
) -> None:
    worst = max(pairs, key=lambda pair: dims[pair[0]] * dims[pair[1]], default=None)
    if worst is None:
        return
    source = min(worst, key=lambda k: dims[k])
    need = (
        4
        * groups
        * itemsize
        * dims[source]
        * sum(dims[v] for v in range(len(dims)) if (v, source) in pairs or (source, v) in pairs)
    )
    if need > budget:
        side = int((budget / (4 * groups * itemsize)) ** 0.5)
        raise MemoryBudgetError(
            f"mode='exact' needs {need / 2**30:.1f} GiB for the blocks of '{names[source]}' (block "
            f"{dims[worst[0]]} × {dims[worst[1]]}), {budget / 2**30:.1f} GiB are allowed, which is enough for blocks "
            f"of about {side} × {side}: raise memory=, choose smaller points, or use mode='auto' or 'probes'."
        )


def plan(
    structures: Sequence[Structure],
    *,
    mode: str = "auto",
    batch_mode: str = "shared",
    probes: int = 32,
    memory: int | None = None,
) -> Plan:
    """Choose methods, sources and probe chunks.

    Args:
        structures: one per distinct graph of the stream (usually one); all have the same points.
        mode: ``"auto"`` takes, per pair, the first that applies: structural zero, Gram, exact where it needs no more
            sweeps than probes would, probes. ``"exact"``: identity probes everywhere. ``"gram"``: Gram for the GN
            parts whatever it costs. ``"probes"``: estimates everywhere.
        batch_mode: meaning of the batch axis.
        probes: Rademacher probes per source.
        memory: bytes that results and sweeps may take; None: half of what is free.

    Raises:
        OptionError: unknown mode or batch mode.
        BatchCouplingError: ``per_sample`` where samples interact.
        MemoryBudgetError: ``mode="exact"`` beyond memory.
    """
    choose("mode", mode, MODES)
    choose("batch_mode", batch_mode, BATCH_MODES)
    first, graphs = structures[0], [s.graph for s in structures]
    graph, names, count = first.graph, first.names, len(first.names)
    if batch_mode == "per_sample" and not all(g.separable for g in graphs):
        where = first.coupled or "the loss"
        raise BatchCouplingError(
            f"batch_mode='per_sample' needs independent samples, but they interact at {where}: put BatchNorm into eval "
            "mode, or use batch_mode='shared' or 'joint'."
        )
    dims, itemsize = _dims(graph, batch_mode), graph.nodes[graph.points[0].sites[0]].dtype.itemsize
    budget = available_memory() // 2 if memory is None else int(memory)
    gram = bool(first.gn_alive.any()) and _want_gram(graphs, dims, mode, batch_mode, probes, budget // 4, itemsize)
    alive, tensor = first.alive, first.tensor_alive
    pairs = [(v, w) for v in range(count) for w in range(v, count) if alive[v, w] and (tensor[v, w] or not gram)]
    cheap = [mode == "exact" or (mode != "probes" and dim <= 2 * probes) for dim in dims]
    method = np.full((count, count), "zero", dtype="<U6")
    method[alive] = "gram"
    reads: dict[tuple[int, str], list[int]] = {}
    for v, w in pairs:
        ends = [k for k in (v, w) if cheap[k]]
        how = "exact" if ends else "probes"
        source = min(ends, key=lambda k: dims[k]) if ends else v
        method[v, w] = method[w, v] = how
        reads.setdefault((source, how), []).append(w if source == v else v)
    if mode == "exact":
        groups = sum(g.batch_size for g in graphs) if batch_mode == "per_sample" else 1
        _check_exact(names, dims, pairs, itemsize, groups, budget)
    sources, spectral = [], Cost()
    single = [path_cost(graph, point.sites) for point in graph.points]
    for (k, how), targets in sorted(reads.items()):
        count_k = dims[k] if how == "exact" else probes
        if how == "probes":
            for v in targets:
                spectral = spectral + (single[k] + single[v]) * (2 * SPECTRAL_STEPS)
        once = sweep_cost(first, k, targets)
        sources.append(Source(k, how, count_k, tuple(sorted(targets)), once.flops * count_k, once.bytes * count_k))
    gn_method = np.where(first.gn_alive, np.where(gram, "gram", method), "zero")
    tensor_method = np.where(tensor, method, "zero")
    columns = sum(_gram_columns(g, batch_mode)[0] for g in graphs) if gram else 0
    every = [site for point in graph.points for site in point.sites]
    per_probe = sweep_bytes(graph, every, every, 2 if tensor.any() else 1, batch_mode)
    chunk = min(probe_chunk(per_probe, budget), max(probes, 1))
    held = sum(g.nodes[k].numel for g in graphs for k in g.out) * sum(dims) * itemsize if gram else 0
    return Plan(
        first,
        method,
        gn_method,
        tensor_method,
        tuple(sources),
        columns,
        path_cost(graph, every) * columns,
        spectral,
        chunk,
        chunk * per_probe + held,
    )
