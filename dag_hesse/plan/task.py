"""What is to be planned: structures, how many batches have each, and what the user asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import numpy as np

from dag_hesse._structure import Structure
from dag_hesse.ir import CurvatureGraph

Pair = tuple[int, int]  # of point indices, the smaller first


@dataclass(frozen=True)
class Task:
    """Structures with the number of their batches, and the options; ``budget`` in bytes."""

    structures: Sequence[Structure]
    counts: Sequence[int]
    mode: str
    batch_mode: str
    probes: int
    budget: int

    @cached_property
    def structure(self) -> Structure:
        """Of all batches together, over the first one's graph: zero is what is zero in each of them."""
        return together(self.structures)

    @property
    def graph(self) -> CurvatureGraph:
        """The first one."""
        return self.structure.graph

    @property
    def graphs(self) -> list[CurvatureGraph]:
        """One per structure."""
        return [structure.graph for structure in self.structures]

    @property
    def itemsize(self) -> int:
        """Bytes of a vector's element."""
        return self.graph.nodes[self.graph.points[0].sites[0]].dtype.itemsize

    @cached_property
    def dims(self) -> list[int]:
        """Lengths of the points' vectors, per group."""
        nodes, whole = self.graph.nodes, self.batch_mode == "joint" and not self.graph.separable
        return [nodes[p.sites[0]].numel if whole and p.kind == "activation" else p.dim for p in self.graph.points]

    @cached_property
    def cheap(self) -> list[bool]:
        """Per point, whether its blocks are swept exactly: then identity probes are not many more than random ones."""
        few = 0 if self.mode == "probes" else 2 * self.probes
        return [self.mode == "exact" or dim <= few for dim in self.dims]

    @cached_property
    def alive_pairs(self) -> list[Pair]:
        """Pairs of points whose block is not zero by structure."""
        alive, count = self.structure.alive, len(self.dims)
        return [(v, w) for v in range(count) for w in range(v, count) if alive[v, w]]

    @cached_property
    def curved_pairs(self) -> list[Pair]:
        """Those with a tensor part: the Gram route does not settle them."""
        return [pair for pair in self.alive_pairs if self.structure.tensor_alive[pair]]


def together(structures: Sequence[Structure]) -> Structure:
    """Of all batches: zero is what is zero in each of them."""
    return reduce(_together, structures)


def _together(a: Structure, b: Structure) -> Structure:
    return replace(
        a,
        gn_alive=a.gn_alive | b.gn_alive,
        tensor_alive=a.tensor_alive | b.tensor_alive,
        rank_bound=np.maximum(a.rank_bound, b.rank_bound),
        shared_rank_bound=np.maximum(a.shared_rank_bound, b.shared_rank_bound),
        distance=np.where(a.distance < 0, b.distance, a.distance),
        coupled=a.coupled or b.coupled,
    )
