"""The DAG whose nodes are the points: an edge v → u where some path from v to u passes no other point."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dag_hesse.ir import CurvatureGraph


@dataclass(frozen=True)
class PointGraph:
    """Children of every point, by position; points are in topological order and out is the last."""

    names: tuple[str, ...]
    children: tuple[tuple[int, ...], ...]

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(v, u) for every edge v → u."""
        return tuple((v, u) for v, below in enumerate(self.children) for u in below)

    @property
    def out_degree(self) -> int:
        """s = max |Ch(v)|."""
        return max(map(len, self.children), default=0)

    @cached_property
    def reaches(self) -> NDArray[np.bool_]:
        """n×n: whether a path leads from v to w; every point reaches itself."""
        found = np.eye(len(self.names), dtype=bool)
        for v in reversed(range(len(self.names))):
            for u in self.children[v]:
                found[v] |= found[u]
        return found

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """n×n: edges of the shortest directed path from v to w; -1 where there is none."""
        return _shortest(self.names, {(v, u) for v, u in self.edges})

    @cached_property
    def distance(self) -> NDArray[np.int64]:
        """n×n: edges of the shortest path that may go against edges (Theorem 77); -1 where there is none."""
        return _shortest(self.names, {pair for v, u in self.edges for pair in ((v, u), (u, v))})

    @cached_property
    def passes(self) -> NDArray[np.bool_]:
        """n×n: whether w lies on every path from v to out, and is reached from v (w post-dominates v)."""
        count = len(self.names)
        found = np.zeros((count, count), dtype=bool)
        for w in range(count):
            bypass = [False] * count  # whether out is reached without w
            for v in reversed(range(count)):
                bypass[v] = v != w and (v == count - 1 or any(bypass[u] for u in self.children[v]))
            found[:, w] = self.reaches[:, w] & ~np.array(bypass)
        return found


def _shortest(names: tuple[str, ...], edges: set[tuple[int, int]]) -> NDArray[np.int64]:
    count, far = len(names), 1 << 40
    hops = np.full((count, count), far, dtype=np.int64)
    np.fill_diagonal(hops, 0)
    for v, u in edges:
        hops[v, u] = 1
    for middle in range(count):
        hops = np.minimum(hops, hops[:, middle : middle + 1] + hops[middle : middle + 1, :])
    return np.where(hops < far, hops, -1)


def point_graph(graph: CurvatureGraph) -> PointGraph:
    """Read off a graph whose points are single activations, out the last."""
    place = {point.sites[0]: k for k, point in enumerate(graph.points)}
    to_out = graph.ancestors(graph.out)
    below = []
    for point in graph.points:
        seen, stack, found = set[int](), list(point.sites), set[int]()
        while stack:
            for child in graph.children[stack.pop()]:
                if child in seen or not to_out[child] or not graph.nodes[child].is_differentiable:
                    continue
                seen.add(child)
                if child in place:
                    found.add(place[child])
                else:
                    stack.append(child)
        below.append(tuple(sorted(found)))
    return PointGraph(tuple(point.name for point in graph.points), tuple(below))
