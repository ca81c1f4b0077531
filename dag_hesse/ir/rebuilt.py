"""A graph with other nodes: whatever refers to nodes by number is given their new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dag_hesse.ir.graph import CurvatureGraph
from dag_hesse.ir.node import Node


def rebuilt(
    graph: CurvatureGraph, nodes: Sequence[Node], places: Mapping[int, int], origins: Sequence[int]
) -> CurvatureGraph:
    """``graph`` with other nodes: where its own are among them, and per new node an old one with its batch axis."""

    def at(old: Sequence[int]) -> tuple[int, ...]:
        return tuple(places[k] for k in old)

    return replace(
        graph,
        nodes=list(nodes),
        loss=places[graph.loss],
        out=at(graph.out),
        parameters={name: places[k] for name, k in graph.parameters.items()},
        inputs={places[k]: position for k, position in graph.inputs.items()},
        constants={places[k]: tensor for k, tensor in graph.constants.items()},
        taps={name: at(sites) for name, sites in graph.taps.items() if all(k in places for k in sites)},
        points=tuple(replace(point, sites=at(point.sites)) for point in graph.points),
        guards=tuple(replace(guard, node=places[guard.node]) for guard in graph.guards),
        children=[],
        batch_axes=[graph.batch_axes[k] for k in origins],
        interactions=[graph.interactions[k] for k in origins],
        ends=[graph.ends[k] for k in origins],
    )
