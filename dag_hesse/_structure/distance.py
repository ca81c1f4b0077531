"""How far points are from each other. Parameters are leaves, and lie where the data meets them: at their layer's op."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dag_hesse.ir import CurvatureGraph, Kind
from dag_hesse.rules.table import rule_for


def distances(graph: CurvatureGraph) -> NDArray[np.int64]:
    """n×n: points passed on the way between two, or from both to where they meet; -1 where they never do.

    Points whose places are the same are at distance 0 (paper, Theorem 77).
    """
    places, reaching = _places(graph), graph.ancestors([graph.loss])
    points_at: dict[int, set[int]] = {}
    for k, place in enumerate(places):
        for site in place:
            points_at.setdefault(site, set()).add(k)
    count = len(places)
    far = np.iinfo(np.int64).max // 4
    hops = np.full((count, count + 1), far)  # the last column is the loss
    for k, place in enumerate(places):
        seen, stack = set(place), list(place)
        while stack:
            for child in graph.children[stack.pop()]:
                if child in seen or not reaching[child] or graph.nodes[child].kind is Kind.CONST:
                    continue
                seen.add(child)
                others = points_at.get(child, set()) - {k}
                for other in others:
                    hops[k, other] = 1
                if child == graph.loss:
                    hops[k, count] = 1
                if not others:
                    stack.append(child)
        for other in {k}.union(*(points_at[site] for site in place)):
            hops[k, other] = 0
    square = np.vstack([hops, np.full((1, count + 1), far)])
    square[count, count] = 0
    for middle in range(count):
        square = np.minimum(square, square[:, middle : middle + 1] + square[middle : middle + 1, :])
    # Siblings meet at a common descendant; the loss is one for every pair.
    meet = (square[:count, None, :] + square[None, :count, :]).min(axis=2)
    direct = np.minimum(square[:count, :count], square[:count, :count].T)
    distance = np.where(direct < far, direct, meet)
    return np.where(distance < far, distance, -1)


def _places(graph: CurvatureGraph) -> list[set[int]]:
    """Per point, the nodes where it lies."""
    met, reaching = graph.descendants(graph.inputs), graph.ancestors([graph.loss])
    return [
        set(point.sites) if point.kind == "activation" else set(_ops(graph, point.sites, met, reaching))
        for point in graph.points
    ]


def _ops(graph: CurvatureGraph, sites: Iterable[int], met: list[bool], reaching: list[bool]) -> list[int]:
    """The first ops after some leaves that depend on the model's inputs as well; their children where none does."""
    found, stack, seen = list[int](), list(sites), set[int]()
    while stack:
        for child in graph.children[stack.pop()]:
            if child not in seen and reaching[child]:
                seen.add(child)
                (found if met[child] else stack).append(child)
    found = found or [child for k in sites for child in graph.children[k] if reaching[child]]
    return [_with_bias(graph, k, met, reaching) for k in found]


def _with_bias(graph: CurvatureGraph, k: int, met: list[bool], reaching: list[bool]) -> int:
    """Where a bias lies as well: past all that is linear and meets nothing but parameters."""
    while True:
        children = {child for child in graph.children[k] if reaching[child]}
        if len(children) != 1 or graph.nodes[k].taps:
            return k
        (child,) = children
        node = graph.nodes[child]
        alone = all(other == k or not met[other] for other in node.inputs)
        if not (alone and node.is_differentiable and rule_for(node).linear):
            return k
        k = child
