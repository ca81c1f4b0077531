"""Readable text of a graph."""

from __future__ import annotations

from typing import Any

from dag_hesse.ir.graph import CurvatureGraph
from dag_hesse.ir.node import Kind, Node, Ref, refill


def _argument(node: Node, arg: Any) -> str:
    shown = refill(arg, lambda ref: _Name(f"%{node.inputs[ref.slot]}"))
    return repr(shown)


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def line(graph: CurvatureGraph, node: Node) -> str:
    """Return one line: index, kind, op with arguments, shape, dtype, names."""
    dtype = str(node.dtype).removeprefix("torch.")
    if node.kind in (Kind.INPUT, Kind.PARAM) or node.target is None:
        call = node.name
    else:
        shown = [_argument(node, arg) for arg in node.args]
        shown += [f"{key}={_argument(node, arg)}" for key, arg in node.kwargs.items()]
        op = f"region<{node.target}>" if node.op == "region" else node.op
        call = f"{op.removeprefix('aten.').removeprefix('dag_hesse.')}({', '.join(shown)})"
    marks = list(node.taps)
    marks += ["out"] if node.index in graph.out else []
    marks += ["loss"] if node.index == graph.loss else []
    tail = f"  # {', '.join(marks)}" if marks else ""
    return f"%{node.index:<4} {node.kind!s:<12} {dtype}{list(node.shape)} = {call}{tail}"


def render(graph: CurvatureGraph) -> str:
    """Return the whole graph as text, one node a line."""
    head = f"CurvatureGraph: {len(graph.nodes)} nodes, batch {graph.batch_size}, loss %{graph.loss}, out " + ", ".join(
        f"%{index}" for index in graph.out
    )
    return "\n".join([head, *(line(graph, node) for node in graph.nodes)])


def render_around(graph: CurvatureGraph, index: int, radius: int = 4) -> str:
    """Return the lines around node ``index``, that line marked."""
    near = graph.nodes[max(0, index - radius) : index + radius + 1]
    return "\n".join(("> " if node.index == index else "  ") + line(graph, node) for node in near)


__all__ = ["Ref", "line", "render", "render_around"]
