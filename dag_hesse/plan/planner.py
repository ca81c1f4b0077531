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


def gram_in_blocks(rows: int, dims: Sequence[int]) -> bool:
    """Whether blocks between points of these sizes take less room than S with so many rows (design §3, Gram route)."""
    return sum(dims[v] * d for v in range(len(dims)) for d in dims[v:]) <= rows * sum(dims)


@dataclass(frozen=True)
class _Gram:
    """What the Gram route takes over all batches: reverse sweeps, bytes held, and the cost of all of it."""

    columns: int
    held: int
    cost: Cost
    feasible: bool  # rows few enough for their Gram matrices, or none needed


def _gram(structures: Sequence[Structure], counts: Sequence[int], dims: list[int], batch_mode: str) -> _Gram:
    graphs = [s.graph for s in structures]
    counted = [(n, *_gram_columns(graph, batch_mode)) for n, graph in zip(counts, graphs, strict=True)]
    columns, rows = sum(n * c for n, c, _ in counted), sum(n * r for n, _, r in counted)
    itemsize = graphs[0].nodes[graphs[0].points[0].sites[0]].dtype.itemsize
    alone = batch_mode == "per_sample"  # every sample has a Gram matrix of its own
    height = max(r // g.batch_size for (_, _, r), g in zip(counted, graphs, strict=True)) if alone else rows
    groups, small = rows // max(height, 1), [min(d, height) for d in dims]
    pairs = [(v, w) for v in range(len(dims)) for w in range(v, len(dims))]
    blocks = not alone and gram_in_blocks(rows, dims)
    if blocks:
        held = 8 * sum(dims[v] * dims[w] for v, w in pairs)
        flops = sum(2.0 * rows * dims[v] * dims[w] for v, w in pairs)
    else:
        held = rows * sum(dims) * itemsize + 8 * height * height * len(dims)
        roots = sum(2.0 * height**2 * d + 9.0 * height**3 for d in dims if d > height)
        flops = groups * (roots + sum(2.0 * height * small[v] * small[w] for v, w in pairs))
    swept = Cost(flops, 0.0)
    for (n, c, _), graph in zip(counted, graphs, strict=True):
        swept = swept + path_cost(graph, [k for point in graph.points for k in point.sites]) * (n * c)
    return _Gram(columns, held, swept, blocks or height <= _GRAM_ROWS)


def _can_gram(graphs: Sequence[CurvatureGraph]) -> bool:
    """Whether all points have a Jacobian from ``out``."""
    after_out = graphs[0].loss_subgraph
    inside = any(after_out[k] or k in graphs[0].out for p in graphs[0].points for k in p.sites)
    return not inside and not any(_nested_out(graph) for graph in graphs)


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


def _sources(
    structures: Sequence[Structure],
    counts: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    dims: list[int],
    cheap: list[bool],
    probes: int,
) -> list[Source]:
    """A sweep per pair, from the end where it is exact with the fewest probes, else from the first."""
    reads: dict[tuple[int, str], list[int]] = {}
    for v, w in pairs:
        ends = [k for k in (v, w) if cheap[k]]
        source = min(ends, key=lambda k: dims[k]) if ends else v
        reads.setdefault((source, "exact" if ends else "probes"), []).append(w if source == v else v)
    found = []
    for (k, how), targets in sorted(reads.items()):
        count, once = dims[k] if how == "exact" else probes, Cost()
        for n, structure in zip(counts, structures, strict=True):
            once = once + sweep_cost(structure, k, targets) * n
        found.append(Source(k, how, count, tuple(sorted(targets)), once.flops * count, once.bytes * count))
    return found


def plan(
    structures: Sequence[Structure],
    *,
    counts: Sequence[int] | None = None,
    mode: str = "auto",
    batch_mode: str = "shared",
    probes: int = 32,
    memory: int | None = None,
) -> Plan:
    """Choose methods, sources and probe chunks.

    Args:
        structures: one per distinct graph of the stream (usually one); all have the same points.
        counts: batches of every structure; None: one each.
        mode: ``"auto"`` takes, per pair, the first that applies: structural zero, Gram (unless sweeps are exact too and
            cost less), exact where it needs no more sweeps than probes would, probes. ``"exact"``: identity probes
            everywhere. ``"gram"``: Gram for the GN parts whatever it costs. ``"probes"``: estimates everywhere.
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
    counts = [1] * len(structures) if counts is None else list(counts)
    graph, names, count = first.graph, first.names, len(first.names)
    _check_separable(first, graphs, batch_mode)
    dims, itemsize = _dims(graph, batch_mode), graph.nodes[graph.points[0].sites[0]].dtype.itemsize
    budget = available_memory() // 2 if memory is None else int(memory)
    alive, tensor = first.alive, first.tensor_alive
    every_pair = [(v, w) for v in range(count) for w in range(v, count) if alive[v, w]]
    bent = [pair for pair in every_pair if tensor[pair]]
    cheap = [mode == "exact" or (mode != "probes" and dim <= 2 * probes) for dim in dims]
    swept = _sources(structures, counts, every_pair, dims, cheap, probes)
    route = None
    if mode in ("auto", "gram") and first.gn_alive.any() and _can_gram(graphs):
        route = _gram(structures, counts, dims, batch_mode)
    if route is not None and mode == "auto":
        # A reverse sweep costs half of a probe's; exactness is worth a few probes more.
        affordable = route.columns <= 8 * probes * sum(counts) and route.feasible and route.held <= budget // 4
        beside = sum(s.flops for s in _sources(structures, counts, bent, dims, cheap, probes))
        dearer = all(s.method == "exact" for s in swept) and sum(s.flops for s in swept) < route.cost.flops + beside
        route = route if affordable and not dearer else None
    pairs = every_pair if route is None else bent
    sources = _sources(structures, counts, pairs, dims, cheap, probes)
    method = np.full((count, count), "zero", dtype="<U6")
    method[alive] = "gram"
    for source in sources:
        for v in source.reads:
            method[v, source.point] = method[source.point, v] = source.method
    if mode == "exact":
        groups = sum(n * g.batch_size for n, g in zip(counts, graphs, strict=True)) if batch_mode == "per_sample" else 1
        _check_exact(names, dims, pairs, itemsize, groups, budget)
    gn_method = np.where(first.gn_alive, method if route is None else "gram", "zero")
    every = [site for point in graph.points for site in point.sites]
    per_probe = sweep_bytes(graph, every, every, 2 if tensor.any() else 1, batch_mode)
    chunk = min(probe_chunk(per_probe, budget), max(probes, 1))
    return Plan(
        first,
        method,
        gn_method,
        np.where(tensor, method, "zero"),
        tuple(sources),
        0 if route is None else route.columns,
        Cost() if route is None else route.cost,
        _spectral_cost(structures, counts, sources),
        chunk,
        chunk * per_probe + (0 if route is None else route.held),
    )


def _check_separable(first: Structure, graphs: Sequence[CurvatureGraph], batch_mode: str) -> None:
    if batch_mode == "per_sample" and not all(g.separable for g in graphs):
        where = first.coupled or "the loss"
        raise BatchCouplingError(
            f"batch_mode='per_sample' needs independent samples, but they interact at {where}: put BatchNorm into eval "
            "mode, or use batch_mode='shared' or 'joint'."
        )


def _spectral_cost(structures: Sequence[Structure], counts: Sequence[int], sources: Sequence[Source]) -> Cost:
    """Of the spectral norms of sampled pairs, as a rule."""
    total = Cost()
    for n, structure in zip(counts, structures, strict=True):
        single = [path_cost(structure.graph, point.sites) for point in structure.graph.points]
        for source in sources:
            for v in source.reads if source.method == "probes" else ():
                total = total + (single[source.point] + single[v]) * (2 * SPECTRAL_STEPS * n)
    return total
