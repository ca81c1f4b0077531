"""Two matrix products with a softmax between them become one node, which keeps no scores. Graph in, graph out.

softmax(scale · q k + bias) · drop · v, whoever wrote it: PyTorch's own attention in its math form, or a model's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Any

from dag_hesse.ir import CurvatureGraph, Kind, Node, Ref
from dag_hesse.ir.ops import attention
from dag_hesse.plan.simplify import seeded_or_read, without

_BMM = "aten.bmm.default"
_SOFTMAX = {"aten._softmax.default": False, "aten._safe_softmax.default": True}
_FACTOR = {"aten.mul.Scalar": 1, "aten.mul.Tensor": 1, "aten.div.Scalar": -1, "aten.div.Tensor": -1}


@dataclass
class _Side:
    """What was met between a matrix product and the softmax, the last op first."""

    scale: float = 1.0
    fill: float = 0.0
    added: int | None = None  # nodes of constants
    hidden: int | None = None
    multiplied: int | None = None
    inner: set[int] = field(default_factory=set)
    met: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # a constant's shape, its op's


def fuse_attention(graph: CurvatureGraph) -> CurvatureGraph:
    """The same function, where the scores of attention are nobody's points and go nowhere else."""
    matcher, changed, gone = _Matcher(graph), dict[int, Node](), set[int]()
    for node in graph.nodes:
        found = matcher.match(node)
        if found is not None:
            changed[node.index], inner = found
            gone |= inner
    return without(graph, gone, changed) if changed else graph


class _Matcher:
    def __init__(self, graph: CurvatureGraph) -> None:
        self.graph, self.kept, self.in_loss = graph, seeded_or_read(graph), graph.loss_subgraph
        self.active = graph.active(self.kept - {graph.loss})

    def match(self, last: Node) -> tuple[Node, set[int]] | None:
        """The node of attention that ends in the product ``last``, and the nodes that it takes the place of."""
        if last.op != _BMM or last.kind is not Kind.CONTRACTION or not self.active[last.index]:
            return None
        weights, v = (last.inputs[arg.slot] for arg in last.args)
        behind, ahead = _Side(), _Side()
        top = self._climb(weights, last, behind, set(_SOFTMAX))
        softmax = None if top is None else self.graph.nodes[top]
        if softmax is None or not _along_last(softmax) or behind.added is not None or behind.hidden is not None:
            return None
        first = self._climb(softmax.inputs[0], softmax, ahead, {_BMM})
        if first is None or ahead.multiplied is not None:
            return None
        product, lead = self.graph.nodes[first], _lead(softmax.shape, ahead.met + behind.met)
        if lead is None or product.kind is not Kind.CONTRACTION:
            return None
        q, k = (product.inputs[arg.slot] for arg in product.args)
        constants = [ahead.added, ahead.hidden, behind.multiplied]
        inputs = [q, k, v, *(n for n in constants if n is not None)]
        places = iter(range(3, len(inputs)))
        masks = [None if n is None else Ref(next(places)) for n in constants]
        numbers = (lead, ahead.scale, ahead.fill, behind.scale, _SOFTMAX[softmax.op])
        made = replace(
            last,
            op=str(attention),
            target=attention,
            args=(Ref(0), Ref(1), Ref(2), *masks, *numbers),
            inputs=tuple(inputs),
            kind=Kind.ROWWISE,
        )
        return made, {softmax.index, product.index} | behind.inner | ahead.inner

    def _climb(self, k: int, child: Node, side: _Side, stop: set[str]) -> int | None:
        """Go up from the input ``k`` of ``child`` to an op in ``stop``; None where something else is in the way."""
        while self._private(k, child):
            node = self.graph.nodes[k]
            if node.op in stop:
                return k
            above = self._step(node, side)
            if above is None:
                return None
            side.inner.add(k)
            k, child = above, node
        return None

    def _private(self, k: int, child: Node) -> bool:
        """Whether only ``child`` uses the node, once, and no sweep starts or ends in it."""
        node, graph = self.graph.nodes[k], self.graph
        alone = graph.children[k] == [child.index] and child.inputs.count(k) == 1 and k not in self.kept
        same = self.in_loss[k] == self.in_loss[child.index] and node.dtype == child.dtype
        return alone and same and self.active[k] and node.is_differentiable and len(node.shape) > 1

    def _step(self, node: Node, side: _Side) -> int | None:
        """What the scores were before ``node``, which is written to ``side``; None where it is another kind of op."""
        first = node.inputs[0]
        before = self.graph.nodes[first].shape
        if node.op == "aten.reshape.default":
            return first if before[-2:] == node.shape[-2:] else None
        if node.op == "aten.masked_fill.Scalar":
            return self._fill(node, side) if before == node.shape else None
        number = node.args[1] if node.op in _FACTOR and len(node.args) == 2 else None
        if isinstance(number, (int, float)) and number and node.args[0] == Ref(0):
            side.scale *= float(number) ** _FACTOR[node.op]
            return first
        if node.op in ("aten.add.Tensor", "aten.mul.Tensor") and len(node.inputs) == 2 and not node.kwargs:
            return self._other(node, side)
        return None

    def _fill(self, node: Node, side: _Side) -> int | None:
        value: Any = node.args[2]
        later = side.added is not None and value != -inf  # then the bias would be added to what is filled in
        if side.hidden is not None or side.scale != 1 or later or not self._constant(node.inputs[1]):
            return None
        side.hidden, side.fill = node.inputs[1], float(value)
        side.met.append((self.graph.nodes[side.hidden].shape, node.shape))
        return node.inputs[0]

    def _other(self, node: Node, side: _Side) -> int | None:
        """Scores to which a constant is added, or weights that are multiplied by one."""
        pairs = [(k, other) for k, other in (node.inputs, node.inputs[::-1]) if self._constant(other)]
        if len(pairs) != 1:
            return None
        (scores, other), nodes = pairs[0], self.graph.nodes
        if nodes[scores].shape != node.shape or nodes[other].dtype != node.dtype:
            return None
        if node.op == "aten.mul.Tensor" and side.multiplied is None:
            side.multiplied = other
        elif node.op == "aten.add.Tensor" and side.added is None and side.scale == 1:
            side.added = other
        else:
            return None
        side.met.append((nodes[other].shape, node.shape))
        return scores

    def _constant(self, k: int) -> bool:
        return not self.active[k]


def _lead(shape: tuple[int, ...], met: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[int] | None:
    """Samples and heads, of weights of this shape; None where the constants that were ``met`` have others.

    The axes of a constant are those of the op that it is met in, which a reshape may part from the softmax's.
    """
    lead = list(shape[:-2])
    if all(prod(constant[:-2]) == 1 for constant, _ in met):
        return lead if 0 < len(lead) <= 2 else [prod(lead), 1]
    fits = all(prod(constant[:-2]) == 1 or op == shape for constant, op in met)
    return lead if fits and 0 < len(lead) <= 2 else None


def _along_last(node: Node) -> bool:
    """Whether a softmax goes along the last axis, in its input's precision."""
    return node.args[1] in (-1, len(node.shape) - 1) and not any(node.args[2:]) and not node.kwargs
