"""What is to be planned: structures, how many batches have each, and what the user asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dag_hesse._structure import Structure
from dag_hesse.errors import OptionError, is_integer, kind_of
from dag_hesse.ir import CurvatureGraph
from dag_hesse.names import selected

Pair = tuple[int, int]  # of point indices, the smaller first
Pairs = Iterable[Sequence[str | int]]  # what users say: names, globs or positions of two points each


@dataclass(frozen=True)
class Task:
    """Structures with the number of their batches, and the options; ``budget`` in bytes."""

    structures: Sequence[Structure]
    counts: Sequence[int]
    mode: str
    batch_mode: str
    probes: int
    budget: int
    asked: frozenset[Pair] | None = None  # None: all

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
        """Per point, whether its blocks are swept exactly: identity probes are not many more than random ones then.

        Blocks are held whole, so there must be room for them as well.
        """
        few = 0 if self.mode == "probes" else 2 * self.probes
        room = self.budget // (self.block_bytes * sum(self.dims))
        return [self.mode == "exact" or dim <= min(few, room) for dim in self.dims]

    @property
    def groups(self) -> int:
        """Blocks that a pair has, one a sample or one in all."""
        if self.batch_mode != "per_sample":
            return 1
        return sum(n * graph.batch_size for n, graph in zip(self.counts, self.graphs, strict=True))

    @property
    def block_bytes(self) -> int:
        """What an element of an exact block takes: in all groups, GN and T, while they are made and put together."""
        return 4 * self.groups * self.itemsize

    @cached_property
    def alive_pairs(self) -> list[Pair]:
        """Pairs of points whose block is not zero by structure."""
        alive, count = self.structure.alive, len(self.dims)
        return [(v, w) for v in range(count) for w in range(v, count) if alive[v, w] and not self.skipped[v, w]]

    @cached_property
    def skipped(self) -> NDArray[np.bool_]:
        """n×n: pairs that were not asked for."""
        count = len(self.dims)
        found = np.full((count, count), self.asked is not None)
        for v, w in self.asked or ():
            found[v, w] = found[w, v] = False
        return found

    @cached_property
    def curved_pairs(self) -> list[Pair]:
        """Those with a tensor part: the Gram route does not settle them."""
        return [pair for pair in self.alive_pairs if self.structure.tensor_alive[pair]]


def checked_pairs(pairs: Any) -> list[tuple[Any, Any]] | None:
    """``pairs=`` as a list of two points' names, globs or positions each.

    Raises:
        OptionError: it is no such thing.
    """
    if pairs is None:
        return None
    listed = list(pairs) if isinstance(pairs, Iterable) and not isinstance(pairs, str) else []
    if not listed or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in listed):
        raise OptionError(f"pairs={pairs!r}; expected pairs of points, as [('layer1', 'layer3'), ('layer1', 'fc')].")
    for end in itertools.chain(*listed):
        if not isinstance(end, str) and not is_integer(end):
            raise OptionError(f"pairs holds {kind_of(end)} as a point; expected a name, a glob or a position.")
    return [(v, w) for v, w in listed]


def named_by(pairs: list[tuple[Any, Any]] | None) -> list[str] | None:
    """The points that pairs name; None where there are none, or one is a position."""
    ends = list(dict.fromkeys(end for pair in pairs or () for end in pair))
    return ends if ends and all(isinstance(end, str) for end in ends) else None


def asked_pairs(pairs: list[tuple[Any, Any]] | None, names: Sequence[str]) -> frozenset[Pair] | None:
    """Pairs of point indices that were asked for, and their ends' own blocks, which coupling needs.

    Raises:
        PointError: a name, glob or position stands for no point.
    """
    if pairs is None:
        return None
    ends = [tuple(selected(names, end, "pairs=") for end in pair) for pair in pairs]
    asked = {(min(v, w), max(v, w)) for vs, ws in ends for v, w in itertools.product(vs, ws)}
    return frozenset(asked | {(k, k) for pair in asked for k in pair})


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
