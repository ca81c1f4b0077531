"""The graph algorithms of structure analysis in Python: what ``csrc/reachability.cpp`` does, where it was not built.

Nodes are numbered in topological order; edges are parallel arrays (input < child).
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def reach(nodes: int, inputs: Ints, children: Ints, sites: Ints, points: Ints, count: int) -> NDArray[np.uint8]:
    """(nodes, points): 1 where a site of the point reaches the node; sites reach themselves.

    >>> edges = np.array([0, 1]), np.array([1, 2])
    >>> reach(3, *edges, np.array([1]), np.array([0]), 1).ravel().tolist()
    [0, 1, 1]
    """
    found = np.zeros((nodes, count), dtype=np.uint8)
    found[sites, points] = 1
    for e in np.argsort(children, kind="stable"):
        found[children[e]] |= found[inputs[e]]
    return found


def meetings(reached: NDArray[np.uint8], left: Ints, right: Ints) -> NDArray[np.uint8]:
    """(points, points): 1 where some pair of nodes (left, right) is reached by both."""
    met = reached[left].astype(bool).T @ reached[right].astype(bool)
    return (met | met.T).astype(np.uint8)


def min_cut(inputs: Ints, children: Ints, capacity: Ints, sites: Ints, sinks: Ints) -> int:
    """The least total capacity of nodes that meets every path from a site to a sink, ends included: a maximum flow.

    >>> edges = np.array([0, 0, 1, 2]), np.array([1, 2, 3, 3])  # a diamond
    >>> min_cut(*edges, np.array([9, 2, 3, 9]), np.array([0]), np.array([3]))
    5
    """
    nodes = len(capacity)
    source, sink, unlimited = 2 * nodes, 2 * nodes + 1, int(capacity.sum()) + 1
    network = _Network(2 * nodes + 2)
    for u in range(nodes):  # a node is an arc from where it is entered to where it is left
        network.add(2 * u, 2 * u + 1, int(capacity[u]))
    for u, v in zip(inputs.tolist(), children.tolist(), strict=True):
        network.add(2 * u + 1, 2 * v, unlimited)
    for u in sites.tolist():
        network.add(source, 2 * u, unlimited)
    for u in sinks.tolist():
        network.add(2 * u + 1, sink, unlimited)
    return network.flow(source, sink)


class _Network:
    """Shortest augmenting paths (Edmonds and Karp): arcs come in pairs, an arc and what may flow back."""

    def __init__(self, nodes: int) -> None:
        self._arcs: list[list[int]] = [[] for _ in range(nodes)]
        self._to: list[int] = []
        self._left: list[int] = []

    def add(self, u: int, v: int, capacity: int) -> None:
        """An arc."""
        for start, end, left in ((u, v, capacity), (v, u, 0)):
            self._arcs[start].append(len(self._to))
            self._to.append(end)
            self._left.append(left)

    def flow(self, source: int, sink: int) -> int:
        """The largest flow; what is left of arcs is changed."""
        total = 0
        while path := self._path(source, sink):
            pushed = min(self._left[arc] for arc in path)
            for arc in path:
                self._left[arc] -= pushed
                self._left[arc ^ 1] += pushed
            total += pushed
        return total

    def _path(self, source: int, sink: int) -> list[int]:
        came, todo = {source: -1}, deque([source])
        while todo and sink not in came:
            u = todo.popleft()
            for arc in self._arcs[u]:
                if self._left[arc] and self._to[arc] not in came:
                    came[self._to[arc]] = arc
                    todo.append(self._to[arc])
        path, u = list[int](), sink
        while came.get(u, -1) >= 0:
            path.append(came[u])
            u = self._to[came[u] ^ 1]
        return path


__all__ = ["meetings", "min_cut", "reach"]
