"""FLOPs and bytes of sweeps, counted per node from shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dag_hesse.ir import CurvatureGraph, Node
from dag_hesse.rules.table import rule_for


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations and bytes moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.flops * factor, self.bytes * factor)


def product_flops(graph: CurvatureGraph, node: Node) -> int:
    """FLOPs of one linear product through a node (2 per multiply-add of a contraction, 1 per element elsewhere)."""
    return rule_for(node).flops(node, [graph.nodes[k].shape for k in node.inputs])


def _node_cost(graph: CurvatureGraph, node: Node) -> Cost:
    size = node.dtype.itemsize
    moved = node.numel + sum(graph.nodes[k].numel for k in node.inputs)
    return Cost(product_flops(graph, node), moved * size)


def path_cost(graph: CurvatureGraph, sites: Iterable[int]) -> Cost:
    """Cost of one product through every node between ``sites`` and the loss (one tangent, or one adjoint channel)."""
    reached, reaching = graph.descendants(sites), graph.ancestors([graph.loss])
    total = Cost()
    for node in graph.nodes:
        if node.is_differentiable and reaching[node.index] and any(reached[k] for k in node.inputs):
            total = total + _node_cost(graph, node)
    return total
