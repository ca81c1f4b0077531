"""What must hold of a graph after capture; the message prints the IR around the fault."""

from __future__ import annotations

from typing import Any

from dag_hesse.errors import GraphError
from dag_hesse.ir.graph import CurvatureGraph
from dag_hesse.ir.node import Kind, Node, Ref
from dag_hesse.ir.printer import render_around

_LEAVES = (Kind.INPUT, Kind.PARAM)


def _slots(tree: Any) -> list[int]:
    if isinstance(tree, Ref):
        return [tree.slot]
    if isinstance(tree, (list, tuple)):
        return [slot for item in tree for slot in _slots(item)]
    return []


def _faults(graph: CurvatureGraph, position: int, node: Node) -> list[str]:
    used = sorted(set(_slots(node.args)) | set(_slots(tuple(node.kwargs.values()))))
    leaf = node.target is None
    checks = {
        "its index is its place": node.index == position,
        "inputs come earlier": all(parent < position for parent in node.inputs),
        "each input is used by an argument": leaf or used == list(range(len(node.inputs))),
        "leaves have no inputs": not leaf or not node.inputs,
        "inputs and parameters are leaves": (node.kind not in _LEAVES) or leaf,
        "a differentiable node is floating point": node.kind in (*_LEAVES, Kind.CONST) or node.is_float,
        "a differentiable op has an input a derivative can come from": (
            node.kind in (*_LEAVES, Kind.CONST) or any(graph.nodes[p].is_float for p in node.inputs)
        ),
        "it writes to nothing": not getattr(getattr(node.target, "_schema", None), "is_mutable", False),
        "a CONST leaf has its tensor": node.kind is not Kind.CONST or not leaf or position in graph.constants,
    }
    return [rule for rule, holds in checks.items() if not holds]


def verify(graph: CurvatureGraph) -> CurvatureGraph:
    """Return ``graph`` if it is well formed.

    Raises:
        GraphError: naming the node, the rule it breaks, and the IR around it.
    """
    for position, node in enumerate(graph.nodes):
        faults = _faults(graph, position, node)
        if faults:
            raise GraphError(f"node %{position} breaks: {'; '.join(faults)}\n{render_around(graph, position)}")
    if not 0 <= graph.loss < len(graph.nodes) or graph.nodes[graph.loss].numel != 1:
        raise GraphError(f"loss %{graph.loss} is not a scalar node of the graph")
    for name, sites in graph.taps.items():
        if not all(0 <= site < len(graph.nodes) for site in sites):
            raise GraphError(f"tap '{name}' names a node that does not exist: {sites}")
    return graph
