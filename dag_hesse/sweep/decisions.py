"""Decisions of a forward that the graph's rounding may make otherwise than the model's.

Python looks at numbers, and goes one way or another. A graph that goes the way of its capture must see at other values
whether the model still would; but what it computes is rounded otherwise. Where a comparison, an order or a cast to
integers comes out as it does by less than that, the graph does not know: the model is to be asked.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from dag_hesse.ir import CurvatureGraph, Kind, Node
from dag_hesse.ir.node import fill

_ROUNDINGS = 64  # of the largest operand, that may lie between the two
_COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")
_TO_WHOLE = ("ceil", "floor", "round", "trunc", "sign")  # whose results are floating-point numbers
_LOWEST, _HIGHEST = ("argmin", "min"), ("argmax", "max", "topk")
_ORDERS = (*_LOWEST, *_HIGHEST, "argsort", "kthvalue", "median", "sort")
_OF_ZERO = ("all", "any", "count_nonzero", "logical_and", "logical_not", "logical_or", "logical_xor", "nonzero", "sign")
_SAFE = ("isfinite", "isinf", "isnan", "isneginf", "isposinf", "zeros_like", "ones_like")


def origins(graph: CurvatureGraph, nodes: Set[int]) -> set[int]:
    """The nodes, and all that they are computed from."""
    found = set(nodes)
    for node in reversed(graph.nodes):
        if node.index in found:
            found.update(node.inputs)
    return found


class Decisions:
    """Is shown a graph's values as they are computed (:meth:`see`), and says which decisions are closer than rounding.

    Only what leads to a value or shape that Python looked at matters.
    """

    def __init__(self, graph: CurvatureGraph) -> None:
        self.graph = graph
        wanted = origins(graph, {guard.node for guard in graph.guards})
        computed = _computed(graph)
        self.deciding = {
            node.index: [k for k in node.inputs if computed[k]]
            for node in graph.nodes
            if node.index in wanted and _decides(node) and any(computed[k] for k in node.inputs)
        }
        self.measured = self._operands()
        self.largest: dict[int, Tensor] = {}
        self.sizes: dict[int, Tensor] = {}

    def _operands(self) -> set[int]:
        """What decisions are made by, and what that was added up from."""
        waiting, found = [k for operands in self.deciding.values() for k in operands], set[int]()
        while waiting:
            k = waiting.pop()
            if k in found:
                continue
            found.add(k)
            inner = [j for j in self.graph.nodes[k].inputs if self.graph.nodes[j].is_float]
            found.update(j for j in inner if not self._hands_on(j))
            waiting += [j for j in inner if self._hands_on(j)]
        return found

    def _hands_on(self, k: int) -> bool:
        """Whether a node has the rounding of what it was made of: views have, and single numbers, as sums are."""
        node = self.graph.nodes[k]
        return node.target is not None and (node.kind is Kind.STRUCTURAL or node.numel == 1)

    def see(self, node: Node, inputs: Sequence[Tensor], value: Tensor) -> bool:
        """Whether the node decides by less than rounding."""
        if node.index in self.measured and node.is_float and value.numel():
            self.largest[node.index] = own = value.abs().amax().double()
            handed = [self.sizes[k] for k in node.inputs if k in self.sizes and self._hands_on(k)]
            self.sizes[node.index] = torch.stack([own, *handed, *self._near(node)]).amax()
        operands = self.deciding.get(node.index)
        if operands is None:
            return False
        sizes = [self.sizes[k] for k in operands if k in self.sizes]
        if not sizes:
            return False
        eps = max(torch.finfo(self.graph.nodes[k].dtype).eps for k in operands)
        return _is_close(node, inputs, float(torch.stack(sizes).amax()) * _ROUNDINGS * eps)

    def _near(self, node: Node) -> list[Tensor]:
        return [self.largest[k] for k in node.inputs if k in self.largest]


def _family(node: Node) -> str:
    return node.op.split(".")[1] if node.op.startswith("aten.") else node.op


def _decides(node: Node) -> bool:
    family = _family(node)
    return (not node.is_float and family not in _SAFE) or family in _TO_WHOLE


def _computed(graph: CurvatureGraph) -> list[bool]:
    """Nodes of floating-point numbers that were rounded: no leaves, draws, or views and copies of these."""
    found: list[bool] = []
    for node in graph.nodes:
        exact = node.target is None or node.draws or not node.is_float
        handed = node.kind is Kind.STRUCTURAL or _family(node) in ("alias", "detach", "clone")
        found.append(not exact and (not handed or any(found[k] for k in node.inputs)))
    return found


def _is_close(node: Node, inputs: Sequence[Tensor], limit: float) -> bool:
    family, (args, _) = _family(node), fill(node, inputs)
    x = args[0]
    if family in _COMPARISONS:
        a, b = (v.double() if isinstance(v, Tensor) and not v.is_complex() else v for v in args[:2])
        return bool(((a - b).abs() <= limit).any())
    if family in _ORDERS:
        return _has_ties(node, x, args, limit)
    if family in _OF_ZERO or node.dtype is torch.bool:
        return any(bool((v.abs() <= limit).any()) for v in inputs if v.is_floating_point() or v.is_complex())
    if family in _TO_WHOLE or family == "_to_copy":
        x = x.double() - 0.5 if family == "round" else x.double()
        return bool(((x - x.round()).abs() <= limit).any())
    return True  # nobody knows


def _has_ties(node: Node, x: Tensor, args: Sequence[Any], limit: float) -> bool:
    """Whether elements that an order puts one behind the other are as good as equal."""
    family, rest = _family(node), list(args[1:])
    count = int(rest.pop(0)) if family in ("topk", "kthvalue") else 1
    dim = next((int(v) for v in rest[:1] if isinstance(v, int) and not isinstance(v, bool)), None)
    dim = node.kwargs.get("dim", dim)
    whole = dim is None and family in ("argmax", "argmin", "max", "min", "median")
    x, dim = (x.flatten(), 0) if whole or x.ndim == 0 else (x, -1 if dim is None else dim)
    gaps = x.double().sort(dim)[0].diff(dim=dim)
    size = gaps.shape[dim]
    if family in _LOWEST:
        gaps = gaps.narrow(dim, 0, min(count, size))
    elif family in _HIGHEST:
        gaps = gaps.narrow(dim, size - min(count, size), min(count, size))
    return bool((gaps <= limit).any())


__all__ = ["Decisions", "origins"]
