"""Requests swept through all batches, a chunk of probes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from dag_hesse.errors import NonFiniteError, out_of_memory
from dag_hesse.sweep.embed import read_parts, seed
from dag_hesse.sweep.kept import Linearizations
from dag_hesse.sweep.meaning import Entry, Meaning
from dag_hesse.sweep.parts import Parts, Request, in_a_row
from dag_hesse.sweep.product import AnyLinearization, sweep

Progress = Callable[[int], None]  # probes swept since the last call
Pair = tuple[Tensor | None, Tensor | None]  # (GN, T)


def pieces(count: int, most: int, start: int = 0) -> list[slice]:
    """The rows from ``start`` to ``count`` in pieces of at most so many, as equal as can be.

    Examples:
        >>> pieces(7, 3)
        [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    """
    found = []
    while start < count:
        left = count - start
        stop = start + -(-left // -(-left // most))
        found.append(slice(start, stop))
        start = stop
    return found


class Runner:
    """Sweeps requests through linearizations.

    Args:
        meaning: what vectors stand for.
        kept: the linearizations.
        chunk: most probes in one sweep; halved when memory runs out.

    Attributes:
        sweeps: probes swept so far.
    """

    def __init__(self, meaning: Meaning, kept: Linearizations, chunk: int) -> None:
        self.meaning, self.kept, self.chunk, self.sweeps = meaning, kept, chunk, 0

    def run(self, requests: Sequence[Request], parts: str, progress: Progress | None) -> list[dict[int, Parts]]:
        """Per request, ``{read point: Parts}``; shared entries are added, per-sample groups put side by side."""
        results: list[dict[int, Parts]] = [{} for _ in requests]
        separate, anew, start = self.meaning.separate_groups, not self.kept.complete, 0
        for entry, lin in self.kept:
            stop = start + entry.groups
            for request, result in zip(requests, results, strict=True):
                z = {k: x[:, start:stop] if separate else x for k, x in request.z.items()}
                for v, found in self._swept(entry, lin, z, request.reads, parts, progress).items():
                    if v not in result:
                        result[v] = found
                    elif separate:
                        result[v] = result[v].beside(found, start, entry.groups)
                    else:
                        result[v] = result[v].plus(found)
            start = stop
        if anew:
            self._check_finite(requests, results)
        return results

    def _swept(
        self,
        entry: Entry,
        lin: AnyLinearization,
        z: Mapping[int, Tensor],
        reads: Sequence[int],
        parts: str,
        progress: Progress | None,
    ) -> dict[int, Parts]:
        """Products of one entry, all probes."""
        like = next(iter(z.values()))
        swept: dict[int, tuple[list[Tensor | None], list[Tensor | None]]] = {v: ([], []) for v in reads}
        for count, found in self._chunks(entry, lin, z, reads, parts):
            for v, pair in found.items():
                for part, x in zip(swept[v], pair, strict=True):
                    part.append(x if x is None else x.to(like.dtype))
            self.sweeps += count
            if progress is not None:
                progress(count)
        joined = partial(in_a_row, lin.arena, scale=entry.scale)
        return {v: Parts(joined(gn), joined(tensor)) for v, (gn, tensor) in swept.items()}

    def _chunks(
        self, entry: Entry, lin: AnyLinearization, z: Mapping[int, Tensor], reads: Sequence[int], parts: str
    ) -> Iterator[tuple[int, dict[int, Pair]]]:
        """(probes, what is read of them), in chunks of equal size that memory has room for."""
        count, done = len(next(iter(z.values()))), 0
        while done < count:
            stop = pieces(count, self.chunk, done)[0].stop
            some = {k: x[done:stop] for k, x in z.items()}
            try:
                found = self._one(entry, lin, some, reads, parts)
            except (MemoryError, RuntimeError) as error:
                if self.chunk == 1 or not out_of_memory(error):
                    raise
                self.chunk = max(1, self.chunk // 2)  # halve and go on
                continue
            yield stop - done, found
            done = stop

    def _one(
        self, entry: Entry, lin: AnyLinearization, z: Mapping[int, Tensor], reads: Sequence[int], parts: str
    ) -> dict[int, Pair]:
        """One sweep: per read point, (GN, T)."""
        graph, embedding, like = entry.graph, self.meaning.embedding, next(iter(z.values()))
        sites = {k for v in reads for k in entry.points[v].sites}
        found = sweep(lin, self._seeds(entry, z), sites, parts, embedding)
        return {v: read_parts(graph, entry.points[v], found, like, embedding) for v in reads}

    def _seeds(self, entry: Entry, z: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Perturbations of all nodes of the sources; points that share a node are added there."""
        seeds: dict[int, Tensor] = {}
        for k, vectors in z.items():
            for node, x in seed(entry.graph, entry.points[k], vectors, self.meaning.embedding).items():
                x = x.to(entry.graph.nodes[node].dtype)
                seeds[node] = seeds[node] + x if node in seeds else x
        return seeds

    def _check_finite(self, requests: Sequence[Request], results: Sequence[dict[int, Parts]]) -> None:
        """The first products of a linearization tell whether its second derivatives are finite."""
        for request, result in zip(requests, results, strict=True):
            parts = [(v, x) for v, found in result.items() for x in (found.gn, found.tensor) if x is not None]
            bad = [self.meaning.points[v].name for v, x in parts if not bool(x.sum().isfinite())]
            if bad and all(bool(z.sum().isfinite()) for z in request.z.values()):
                names = ", ".join(repr(name) for name in dict.fromkeys(bad[:4]))
                raise NonFiniteError(
                    f"second derivatives at {names} are not finite: some op of the model has infinite ones at its "
                    "present values (a root or a power below 2 at 0, say)."
                )
