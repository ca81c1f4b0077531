"""Points, batches and batch mode put together: vectors in, vectors out, whatever the batch axis means."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from dag_hesse.capture import Batch, Batches
from dag_hesse.capture.reduction import Reduction
from dag_hesse.errors import CaptureError, NonFiniteError, StaleError, out_of_memory
from dag_hesse.ir import CurvatureGraph, Point
from dag_hesse.kernels.pool import Pool, empty
from dag_hesse.measure import available_memory
from dag_hesse.plan.fuse import fuse
from dag_hesse.plan.memory import linearization_bytes
from dag_hesse.randomness import RandomState, preserved
from dag_hesse.sweep.embed import read_parts, reader, seed
from dag_hesse.sweep.engine import sweep
from dag_hesse.sweep.linearize import Linearization
from dag_hesse.sweep.watch import Watch


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
    """One batch (or one sample of it) of the problem, by its number; ``scale`` multiplies its Hessian."""

    graph: CurvatureGraph
    batch: int
    scale: float
    sample: int | None = None
    groups: int = 1


class Problem:
    """What is to be measured: a model, its batches, its points, and what the batch axis means.

    Args:
        model: the module whose parameters are read.
        graphs, batches: one captured graph per batch (the same object for batches of equal shapes).
        batch_mode: ``"shared"``, ``"per_sample"`` or ``"joint"`` (design §2.3).
        reduction: how the batches' losses add up.
        tensor_part: whether the T channel is wanted.
        with_out: linearize from ``out`` on as well (the Gram route seeds there).
        chunk: most probes in one sweep; halved when memory runs out.
        again: captures a batch whose values lead the forward another way than its graph goes (it is told once).
        loss: what the loss was asked of; watched for changes.
    """

    def __init__(
        self,
        model: nn.Module,
        graphs: Sequence[CurvatureGraph],
        batches: Batches,
        batch_mode: str,
        *,
        reduction: Reduction = Reduction("mean"),  # noqa: B008  (frozen)
        tensor_part: bool = True,
        with_out: bool = True,
        chunk: int = 8,
        again: Callable[[Batch], CurvatureGraph] | None = None,
        loss: Any = None,
    ) -> None:
        self.model, self.batches, self.mode, self.chunk, self.again = model, batches, batch_mode, chunk, again
        self.tensor_part, self.with_out = tensor_part, with_out
        first = graphs[0]
        self.points = first.points
        unbatched = any(p.kind == "parameter" or any(first.layouts[k] is None for k in p.sites) for p in self.points)
        self.masked = batch_mode == "per_sample" and unbatched
        self.how = self._reading(first, unbatched)
        self.entries: list[Entry] = []
        sizes, self.reduction = batches.sizes, reduction
        self.shares = reduction.shares(sizes)
        scales = reduction.per_sample(sizes) if batch_mode == "per_sample" else self.shares
        for number, (graph, size, scale) in enumerate(zip(graphs, sizes, scales, strict=True)):
            if batch_mode == "per_sample":
                samples: Iterable[int | None] = range(size) if self.masked else [None]
                self.entries += [Entry(graph, number, scale, b, 1 if self.masked else size) for b in samples]
            elif scale:  # a batch that counts nothing (all of it ignored) has no loss to speak of
                self.entries.append(Entry(graph, number, scale, None, size if self.how == "each" else 1))
        self.groups = sum(entry.groups for entry in self.entries) if self.separate_groups else 1
        self.pool = Pool()
        self._kept: dict[int, Linearization] = {}
        # Random draws are made anew in every linearization, and must agree. Batches draw one after the other.
        self._rng = {0: RandomState.now()}
        self._told = False
        self.watch = Watch(model, self.graphs, batches, loss)
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
    def graphs(self) -> list[CurvatureGraph]:
        """The graph of every entry."""
        return [entry.graph for entry in self.entries]

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of vectors: the widest of the points'."""
        return reduce(torch.promote_types, map(self.dtype_of, range(len(self.points))))

    def dtype_of(self, index: int) -> torch.dtype:
        """Floating-point type of a point: the widest of its nodes'."""
        nodes = self.entries[0].graph.nodes
        return reduce(torch.promote_types, (nodes[k].dtype for k in self.points[index].sites))

    @property
    def device(self) -> torch.device:
        """Where the batch lies."""
        return self.batches.device

    @property
    def loss(self) -> float:
        """The loss over all batches; before any sweep, as it was captured."""
        if not self._losses:
            return sum(entry.graph.value * self.shares[entry.batch] for entry in self.entries if entry.sample is None)
        return sum(value * self.shares[number] for number, value in self._losses.items())

    def release(self) -> None:
        """Let the kept linearizations go; the next sweep makes them anew."""
        self._kept.clear()

    def check(self, what: str, advice: str) -> None:
        """Raise :class:`StaleError` if something changed since the problem was posed (or last noted)."""
        changed = self.watch.changes()
        if changed:
            named = ", ".join(changed[:4]) + (" …" if len(changed) > 4 else "")
            raise StaleError(f"{named} changed since {what}: {advice}")

    def dim(self, index: int) -> int:
        """Length of a point's vectors, per group."""
        point = self.points[index]
        if self.how == "whole" and point.kind == "activation":
            return self.entries[0].graph.nodes[point.sites[0]].numel
        return point.dim

    def linearizations(self) -> Iterator[tuple[Entry, Linearization]]:
        """Each entry with its linearization: kept for the next pass while there is room, else made anew.

        Raises:
            UnstableLoaderError: a loader that is read again does not give what it gave first.
        """
        if len(self._kept) == len(self.entries):
            yield from ((entry, self._kept[place]) for place, entry in enumerate(self.entries))
            return
        waiting = deque(enumerate(self.entries))
        for number, batch in enumerate(self.batches):
            while waiting and waiting[0][1].batch == number:
                place, entry = waiting.popleft()
                yield entry, self._kept.get(place) or self._linearize(place, entry, batch)

    def _linearize(self, place: int, entry: Entry, batch: Batch) -> Linearization:
        with preserved(), self.pool.use():
            start = self._rng[max(k for k in self._rng if k <= entry.batch)]  # a batch that counts nothing is left out
            start.restore()
            try:
                lin = self._linearized(entry, batch)
            except CaptureError as error:
                if self.again is None:
                    raise
                self._tell(error)
                start.restore()
                entry.graph = fuse(self.again(batch))
                start.restore()
                lin = self._linearized(entry, batch, checked=False)
            self._rng.setdefault(entry.batch + 1, RandomState.now())
        self._losses[entry.batch] = float(lin.loss)
        if len(self.entries) == 1 or linearization_bytes(entry.graph, self._sites(entry)) < available_memory() // 4:
            self._kept[place] = lin
        return lin

    def _linearized(self, entry: Entry, batch: Batch, *, checked: bool = True) -> Linearization:
        return Linearization(
            entry.graph,
            self.model,
            batch.tensors,
            self._sites(entry),
            tensor_part=self.tensor_part,
            sample=entry.sample,
            checked=checked,
        )

    def _sites(self, entry: Entry) -> set[int]:
        sites = {k for point in self.points_of(entry) for k in point.sites}
        return sites | set(entry.graph.out) if self.with_out else sites

    def _tell(self, error: CaptureError) -> None:
        if not self._told:
            warnings.warn(f"captured anew, as the forward takes another way now: {error}", stacklevel=2)
        self._told = True

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
        anew = len(self._kept) < len(self.entries)
        start = 0
        for entry, lin in self.linearizations():
            stop = start + entry.groups if self.separate_groups else 1
            for request, result in zip(requests, results, strict=True):
                z = {k: x[:, start:stop] if self.separate_groups else x for k, x in request.z.items()}
                for v, blocks in self._one(entry, lin, request, z, channels, progress).items():
                    result[v] = self._merge(result.get(v), blocks, start)
            start = stop if self.separate_groups else 0
        if anew:
            self._check_finite(requests, results)
        return results

    def _check_finite(self, requests: Sequence[Request], results: Sequence[dict[int, Blocks]]) -> None:
        """The first products of a linearization tell whether its second derivatives are finite."""
        for request, result in zip(requests, results, strict=True):
            parts = [(v, x) for v, blocks in result.items() for x in (blocks.gn, blocks.tensor) if x is not None]
            bad = [self.points[v].name for v, x in parts if not bool(x.sum().isfinite())]
            if bad and all(bool(z.sum().isfinite()) for z in request.z.values()):
                names = ", ".join(repr(name) for name in dict.fromkeys(bad[:4]))
                raise NonFiniteError(
                    f"second derivatives at {names} are not finite: some op of the model bends infinitely at its "
                    "present values (a root or a power below 2 at 0, say)."
                )

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
                x = x.to(entry.graph.nodes[node].dtype)
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
                    found = sweep(lin, self._seeds(entry, pieces), sites, channels, reader(entry.graph, self.how))
                    like = next(iter(pieces.values()))
                    read_now = {v: read_parts(entry.graph, points[v], found, like, self.how) for v in request.reads}
                    del found
            except (MemoryError, RuntimeError) as error:
                if self.chunk == 1 or not out_of_memory(error):
                    raise
                self.chunk = max(1, self.chunk // 2)  # halve and go on
                continue
            for v, pair in read_now.items():
                for part, x in zip(parts[v], pair, strict=True):
                    part.append(x if x is None else x.to(like.dtype))
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
    joined = tensors[0]
    if len(tensors) > 1:
        joined = torch.cat(tensors, out=empty(joined, sum(map(len, tensors)), *joined.shape[1:]))
    return joined if scale == 1.0 else joined * scale
