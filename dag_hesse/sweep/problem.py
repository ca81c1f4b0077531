"""Points, batches and batch mode put together: vectors in, vectors out, whatever the batch axis means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dag_hesse.capture import Batch
from dag_hesse.errors import out_of_memory
from dag_hesse.ir import CurvatureGraph, Point
from dag_hesse.kernels.pool import Pool
from dag_hesse.plan.cost import available_memory
from dag_hesse.plan.memory import linearization_bytes
from dag_hesse.sweep.embed import read_parts, seed
from dag_hesse.sweep.engine import sweep
from dag_hesse.sweep.linearize import Linearization


@dataclass(frozen=True)
class Blocks:
    """Products of one source's probes with the blocks of one read point: (probes, groups, dim) each; None is zero."""

    gn: Tensor | None
    tensor: Tensor | None

    @property
    def full(self) -> Tensor | None:
        """GN + T."""
        if self.gn is None or self.tensor is None:
            return self.tensor if self.gn is None else self.gn
        return self.gn + self.tensor


@dataclass(frozen=True)
class Request:
    """One set of probes: ``z`` (probes, groups, dim) per source point, read at points ``reads`` (indices)."""

    z: Mapping[int, Tensor]
    reads: tuple[int, ...]


@dataclass
class Entry:
    """One batch (or one sample of it) of the problem; ``scale`` multiplies its Hessian."""

    graph: CurvatureGraph
    batch: Batch
    scale: float
    sample: int | None = None
    groups: int = 1


class Problem:
    """What is to be measured: a model, its batches, its points, and what the batch axis means.

    Args:
        model: the module whose parameters are read.
        graphs, batches: one captured graph per batch (the same object for batches of equal shapes).
        batch_mode: ``"shared"``, ``"per_sample"`` or ``"joint"`` (design §2.3).
        tensor_part: whether the T channel is wanted.
        with_out: linearize from ``out`` on as well (the Gram route seeds there).
        chunk: most probes in one sweep; halved when memory runs out.
    """

    def __init__(
        self,
        model: nn.Module,
        graphs: Sequence[CurvatureGraph],
        batches: Sequence[Batch],
        batch_mode: str,
        *,
        tensor_part: bool = True,
        with_out: bool = True,
        chunk: int = 8,
    ) -> None:
        self.model, self.mode, self.chunk = model, batch_mode, chunk
        self.tensor_part, self.with_out = tensor_part, with_out
        first = graphs[0]
        self.points = first.points
        unbatched = any(p.kind == "parameter" or any(first.layouts[k] is None for k in p.sites) for p in self.points)
        self.masked = batch_mode == "per_sample" and unbatched
        self.how = self._reading(first, unbatched)
        total = sum(batch.size for batch in batches)
        self.entries: list[Entry] = []
        for graph, batch in zip(graphs, batches, strict=True):
            if self.masked:
                scale = float(batch.size) if graph.mean_loss else 1.0
                self.entries += [Entry(graph, batch, scale, sample=b) for b in range(batch.size)]
            elif batch_mode == "per_sample":
                self.entries.append(
                    Entry(graph, batch, float(batch.size) if graph.mean_loss else 1.0, None, batch.size)
                )
            else:
                scale = batch.size / total if graph.mean_loss and batch_mode == "shared" else 1.0
                self.entries.append(Entry(graph, batch, scale, None, batch.size if self.how == "each" else 1))
        self.groups = sum(entry.groups for entry in self.entries) if self.separate_groups else 1
        self.pool = Pool()
        self._kept: dict[int, Linearization] = {}
        self._rng = _Generators(self.device)  # dropout masks are drawn anew in every linearization, and must agree
        self.sweeps = 0  # probes swept so far, for reports
        self._losses: dict[int, float] = {}

    def _reading(self, graph: CurvatureGraph, unbatched: bool) -> str:
        if self.mode == "shared" or self.masked:
            return "sum"
        if self.mode == "per_sample":
            return "each"
        return "each" if graph.separable and not unbatched else "whole"

    @property
    def separate_groups(self) -> bool:
        """Whether every sample has a block of its own (then results have a group per sample)."""
        return self.mode == "per_sample" or self.how == "each"

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the points."""
        return self.entries[0].graph.nodes[self.points[0].sites[0]].dtype

    @property
    def device(self) -> torch.device:
        """Where the batch lies."""
        return self.entries[0].batch.tensors[0].device

    @property
    def loss(self) -> float:
        """The loss over all batches: a mean over samples, or a sum where the loss is one. NaN before any sweep."""
        if not self._losses:
            return float("nan")
        by_batch = {id(e.batch): (e.batch.size, self._losses[id(e)]) for e in self.entries if id(e) in self._losses}
        total = sum(size for size, _ in by_batch.values())
        mean = self.entries[0].graph.mean_loss
        return sum(value * (size / total if mean else 1.0) for size, value in by_batch.values())

    @property
    def versions(self) -> tuple[tuple[int, int], ...]:
        """Identity and version counter of parameters, buffers and batch tensors: changes when one is written to."""
        own = [*self.model.parameters(), *self.model.buffers()]
        return tuple((id(t), t._version) for t in [*own, *(t for e in self.entries for t in e.batch.tensors)])

    def release(self) -> None:
        """Let the kept linearizations go; the next sweep makes them anew."""
        self._kept.clear()

    def dim(self, index: int) -> int:
        """Length of a point's vectors, per group."""
        point = self.points[index]
        if self.how == "whole" and point.kind == "activation":
            return self.entries[0].graph.nodes[point.sites[0]].numel
        return point.dim

    def linearizations(self) -> Iterator[tuple[Entry, Linearization]]:
        """Each entry with its linearization: kept for the next pass while there is room, else made anew."""
        for place, entry in enumerate(self.entries):
            if place in self._kept:
                yield entry, self._kept[place]
                continue
            sites = {k for point in self.points_of(entry) for k in point.sites}
            sites |= set(entry.graph.out) if self.with_out else set()
            with torch.random.fork_rng(_devices(self.device)), self.pool.use():
                self._rng.restore()
                lin = Linearization(
                    entry.graph,
                    self.model,
                    entry.batch.tensors,
                    sites,
                    tensor_part=self.tensor_part,
                    sample=entry.sample,
                )
            self._losses[id(entry)] = float(lin.loss)
            if len(self.entries) == 1 or linearization_bytes(entry.graph, sites) < available_memory() // 4:
                self._kept[place] = lin
            yield entry, lin

    def points_of(self, entry: Entry) -> tuple[Point, ...]:
        """The points as nodes of this entry's graph."""
        return entry.graph.points

    def run(
        self, requests: Sequence[Request], *, channels: str = "both", progress: Callable[[int], None] | None = None
    ) -> list[dict[int, Blocks]]:
        """Sweep all requests through all entries; ``channels`` as in :func:`~dag_hesse.sweep.engine.sweep`.

        Returns:
            Per request, ``{read point: Blocks}``; shared entries are added, per-sample groups put side by side.
        """
        results: list[dict[int, Blocks]] = [{} for _ in requests]
        start = 0
        for entry, lin in self.linearizations():
            stop = start + entry.groups if self.separate_groups else 1
            for request, result in zip(requests, results, strict=True):
                z = {k: x[:, start:stop] if self.separate_groups else x for k, x in request.z.items()}
                for v, blocks in self._one(entry, lin, request, z, channels, progress).items():
                    result[v] = self._merge(result.get(v), blocks, start)
            start = stop if self.separate_groups else 0
        return results

    def _merge(self, old: Blocks | None, new: Blocks, start: int) -> Blocks:
        def part(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            if not self.separate_groups or len(self.entries) == 1:
                return b if a is None else a if b is None else a + b
            some = a if a is not None else b
            if some is None:
                return None
            a = some.new_zeros(some.shape[0], start, some.shape[2]) if a is None else a
            b = some.new_zeros(some.shape[0], 1, some.shape[2]) if b is None else b
            return torch.cat([a, b], dim=1)

        return new if old is None else Blocks(part(old.gn, new.gn), part(old.tensor, new.tensor))

    def _seeds(self, entry: Entry, z: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Perturbations of all nodes of the sources; points that share a node are added there."""
        seeds: dict[int, Tensor] = {}
        for k, vectors in z.items():
            for node, x in seed(entry.graph, self.points_of(entry)[k], vectors, self.how).items():
                seeds[node] = seeds[node] + x if node in seeds else x
        return seeds

    def _one(
        self,
        entry: Entry,
        lin: Linearization,
        request: Request,
        z: Mapping[int, Tensor],
        channels: str,
        progress: Callable[[int], None] | None,
    ) -> dict[int, Blocks]:
        points = self.points_of(entry)
        sites = {k for v in request.reads for k in points[v].sites}
        parts: dict[int, tuple[list[Tensor | None], list[Tensor | None]]] = {v: ([], []) for v in request.reads}
        count, done = len(next(iter(z.values()))), 0
        while done < count:
            left = count - done
            stop = done + -(-left // -(-left // self.chunk))  # chunks of equal size
            pieces = {k: x[done:stop] for k, x in z.items()}
            try:
                with self.pool.use():
                    found = sweep(lin, self._seeds(entry, pieces), sites, channels)
                    like = next(iter(pieces.values()))
                    read_now = {v: read_parts(entry.graph, points[v], found, like, self.how) for v in request.reads}
                    del found
            except (MemoryError, RuntimeError) as error:
                if self.chunk == 1 or not out_of_memory(error):
                    raise
                self.chunk = max(1, self.chunk // 2)  # halve and go on
                continue
            for v, (gn, tensor) in read_now.items():
                parts[v][0].append(gn)
                parts[v][1].append(tensor)
            self.sweeps += stop - done
            if progress is not None:
                progress(stop - done)
            done = stop
        return {v: Blocks(_join(gn, entry.scale), _join(tensor, entry.scale)) for v, (gn, tensor) in parts.items()}


def _join(parts: list[Tensor | None], scale: float) -> Tensor | None:
    """Chunks of probes, one behind the other. Whether a part is zero is structural, so it is the same for all."""
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return None
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return joined if scale == 1.0 else joined * scale


class _Generators:
    """The state of the global generators at one time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Set the global generators to it."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
