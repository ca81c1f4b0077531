"""How far points are from each other. Parameters are leaves, and lie where the data meets them: at their layer's op."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dag_hesse._structure import Structure
from dag_hesse._structure.analysis import distances
from dag_hesse.ir import CurvatureGraph


def band_distance(structure: Structure) -> NDArray[np.int64]:
    """n×n: points passed between two points' places in the graph (paper, Theorem 77); 0 where they share one.

    For activations this is the structure's distance. Between parameters that counts the ways to where their effects
    meet, which is 2 for any two layers.
    """
    graph = structure.graph
    if all(point.kind == "activation" for point in graph.points):
        return structure.distance
    met = graph.descendants(graph.inputs)
    reaching = graph.ancestors([graph.loss])
    places = [
        set(_ops(graph, point.sites, met, reaching)) if point.kind == "parameter" else set(point.sites)
        for point in graph.points
    ]
    moved = [replace(p, sites=tuple(sorted(sites))) for p, sites in zip(graph.points, places, strict=True)]
    found = distances(replace(graph, points=tuple(moved)))
    for v, mine in enumerate(places):
        for w, theirs in enumerate(places):
            if mine & theirs:
                found[v, w] = 0
    return found


def _ops(graph: CurvatureGraph, sites: Iterable[int], met: list[bool], reaching: list[bool]) -> list[int]:
    """The first ops after some leaves that depend on the model's inputs as well; their children where none does."""
    found, stack, seen = list[int](), list(sites), set[int]()
    while stack:
        for child in graph.children[stack.pop()]:
            if child not in seen and reaching[child]:
                seen.add(child)
                (found if met[child] else stack).append(child)
    return found or [child for k in sites for child in graph.children[k] if reaching[child]]
