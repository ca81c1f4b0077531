"""What the batch axis means, decided once: what is swept, in how many groups and with which factors (design §2.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from dag_hesse._capture.reduction import Reduction
from dag_hesse.ir import CurvatureGraph, Point


@dataclass
class Entry:
    """One batch (or one sample of it) of a problem, by its number; ``scale`` multiplies its Hessian."""

    graph: CurvatureGraph
    batch: int
    scale: float
    sample: int | None = None
    groups: int = 1

    @property
    def points(self) -> tuple[Point, ...]:
        """The points as nodes of this entry's graph."""
        return self.graph.points


@dataclass(frozen=True)
class Meaning:
    """How vectors of points, samples and batches belong together.

    Attributes:
        graph: of the first batch; points and types are read there.
        batch_mode: ``"shared"``, ``"per_sample"`` or ``"joint"``.
        embedding: of vectors: ``"sum"``, ``"each"`` or ``"whole"`` (:mod:`dag_hesse.sweep.embed`).
        entries: what is swept, one after the other.
        shares: the factor of every batch's loss in the whole.
    """

    graph: CurvatureGraph
    batch_mode: str
    embedding: str
    entries: tuple[Entry, ...]
    shares: tuple[float, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """The points as nodes of the first batch's graph."""
        return self.graph.points

    @property
    def separate_groups(self) -> bool:
        """Whether every sample has a block of its own (then results have a group per sample)."""
        return self.batch_mode == "per_sample" or self.embedding == "each"

    @property
    def groups(self) -> int:
        """Groups of all vectors."""
        return sum(entry.groups for entry in self.entries) if self.separate_groups else 1

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of vectors: the widest of the points'."""
        return reduce(torch.promote_types, map(self.dtype_of, range(len(self.points))))

    def dtype_of(self, index: int) -> torch.dtype:
        """Floating-point type of a point: the widest of its nodes'."""
        return reduce(torch.promote_types, (self.graph.nodes[k].dtype for k in self.points[index].sites))

    def dim(self, index: int) -> int:
        """Length of a point's vectors, per group."""
        point = self.points[index]
        if self.embedding == "whole" and point.kind == "activation":
            return self.graph.nodes[point.sites[0]].numel
        return point.dim


def read_meaning(
    graphs: Sequence[CurvatureGraph], sizes: Sequence[int], batch_mode: str, reduction: Reduction
) -> Meaning:
    """What ``batch_mode`` means for batches of these sizes, a graph each, whose losses add up by ``reduction``.

    Points that have no batch axis (parameters) cannot tell samples apart: then ``per_sample`` sweeps one sample's loss
    at a time, and ``joint`` takes the batch as a whole.
    """
    first = graphs[0]
    unbatched = any(p.kind == "parameter" or any(first.batch_axes[k] is None for k in p.sites) for p in first.points)
    one_by_one = batch_mode == "per_sample" and unbatched
    if batch_mode == "shared" or one_by_one:
        embedding = "sum"
    elif batch_mode == "per_sample":
        embedding = "each"
    else:
        embedding = "each" if first.separable and not unbatched else "whole"
    scales = reduction.per_sample(sizes) if batch_mode == "per_sample" else reduction.shares(sizes)

    def entries() -> Iterator[Entry]:
        for number, (graph, size, scale) in enumerate(zip(graphs, sizes, scales, strict=True)):
            if one_by_one:
                yield from (Entry(graph, number, scale, sample) for sample in range(size))
            elif scale or batch_mode == "per_sample":  # a batch that counts nothing (all of it ignored) has no loss
                yield Entry(graph, number, scale, None, size if embedding == "each" else 1)

    return Meaning(first, batch_mode, embedding, tuple(entries()), tuple(reduction.shares(sizes)))
