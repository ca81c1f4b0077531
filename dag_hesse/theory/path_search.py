"""Paths of a point graph: counted, listed, and the strongest found without listing all."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from dag_hesse.theory.edge_maps import EdgeMaps
from dag_hesse.theory.point_graph import PointGraph

Path = tuple[int, ...]
_EXPANDED = 100_000  # paths that a search looks at


def number_of_paths(graph: PointGraph, source: int, target: int) -> int:
    """How many directed paths lead from one point to another; 1 from a point to itself."""
    ways = {source: 1}
    for v in range(source, target):
        for u in graph.children[v]:
            if v in ways:
                ways[u] = ways.get(u, 0) + ways[v]
    return ways.get(target, 0)


def all_paths(graph: PointGraph, source: int, target: int) -> Iterator[Path]:
    """Every directed path, depth first."""
    if source == target:
        yield (source,)
        return
    for u in graph.children[source]:
        if u <= target:
            yield from ((source, *rest) for rest in all_paths(graph, u, target))


def strength(jacobian: Tensor) -> float:
    """The root mean square over samples of ‖D_p‖_F, of (B, d_u, d_v)."""
    return float(jacobian.pow(2).sum((1, 2)).mean().sqrt())


def strongest(maps: EdgeMaps, source: int, target: int, k: int) -> tuple[list[tuple[float, Path]], bool]:
    """The k strongest paths, strongest first, and whether they are proved to be.

    Best first: the strength of a whole path is at most that of its beginning times the spectral norms of the edges that
    follow, largest over samples. A path is done when no unfinished one could still exceed it.
    """
    norms = {edge: float(torch.linalg.matrix_norm(x, 2).max()) for edge, x in maps.maps.items()}
    best = _best_rest(maps.graph, norms, target)
    if source not in best:
        return [], True
    start, ticket = maps.along((source,)), count()  # tickets keep equal bounds from being compared further
    heap: list[tuple[float, int, Path, Tensor]] = [(-strength(start) * best[source], next(ticket), (source,), start)]
    done: list[tuple[float, Path]] = []
    for _ in range(_EXPANDED):
        if not heap or len(done) == k:
            return done, True
        bound, _, path, jacobian = heapq.heappop(heap)
        if path[-1] == target:
            done.append((-bound, path))
            continue
        for u in maps.graph.children[path[-1]]:
            if u in best:
                onward = maps.maps[path[-1], u] @ jacobian
                heapq.heappush(heap, (-strength(onward) * best[u], next(ticket), (*path, u), onward))
    return done, False


def _best_rest(graph: PointGraph, norms: dict[tuple[int, int], float], target: int) -> dict[int, float]:
    """Per point that reaches ``target``, the largest product of edges' norms on a path there."""
    best = {target: 1.0}
    for v in reversed(range(target)):
        onward = [norms[v, u] * best[u] for u in graph.children[v] if u in best]
        if onward:
            best[v] = max(onward)
    return best
