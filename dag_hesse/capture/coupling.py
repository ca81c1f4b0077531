"""Where the batch axis of every tensor lies, and whether samples interact: read off shapes and ops, no model is run.

Data movement is followed exactly by moving *labels*: the op itself is run on a tensor that holds each element's sample
number. Everything else has a rule per family. Whatever is not understood counts as mixing samples, which is always
safe: it only refuses ``per_sample`` and takes the general path elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dag_hesse.capture.batch import Batch
from dag_hesse.ir import BatchLayout, Coupling, CurvatureGraph, Kind, Node
from dag_hesse.ir.node import execute
from dag_hesse.rules.structural import axes

_SPATIAL = re.compile(
    r"(?:pool|upsample\w*?|reflection_pad|replication_pad|im2col|col2im|nearest_exact)(\d)?d?\b|im2col|col2im"
)
_SUMS = {"aten.sum.default", "aten.sum.dim_IntList", "aten.mean.default", "aten.mean.dim"}
_REDUCTIONS = _SUMS | {
    "aten.amax.default",
    "aten.amin.default",
    "aten.max.default",
    "aten.min.default",
    "aten.logsumexp.default",
    "aten.prod.default",
    "aten.prod.dim_int",
    "aten.any.default",
    "aten.all.default",
    "aten.any.dim",
    "aten.all.dim",
}
_ALONG = {  # ops that mix elements along the dims in the argument at this position
    "aten._softmax.default": 1,
    "aten._safe_softmax.default": 1,
    "aten._log_softmax.default": 1,
    "aten.cumsum.default": 1,
    "aten.sort.default": 1,
    "aten.max.dim": 1,
    "aten.min.dim": 1,
    "aten.median.dim": 1,
    "aten.topk.default": 2,
    "aten.kthvalue.default": 2,
    "dag_hesse.standardize.default": 1,
}
_ACCUMULATING = {"aten.scatter_add.default", "aten.index_add.default", "aten.col2im.default"}
_SAME_SHAPE = {
    "aten._to_copy.default",
    "aten.tril.default",
    "aten.triu.default",
    "dag_hesse.tap.default",
    "aten.clone.default",
}
_LINEAR = {
    "aten.add.Tensor",
    "aten.sub.Tensor",
    "aten.neg.default",
    "aten.mul.Scalar",
    "aten.div.Scalar",
    "aten.add.Scalar",
}


@dataclass(frozen=True, slots=True)
class _State:
    coupling: Coupling
    layout: BatchLayout | None = None
    mean: bool = False


_NONE = _State(Coupling.NONE)
_MIXED = _State(Coupling.MIXED)


class _Walker:
    def __init__(self, graph: CurvatureGraph, batch: Batch, separate: frozenset[int] = frozenset()) -> None:
        self.graph, self.tensors, self.size = graph, batch.tensors, batch.size
        self.separate = separate  # nodes declared SEPARATE, whatever made them
        self.states: list[_State] = []
        self.values: dict[int, Tensor | None] = {}

    def run(self) -> list[_State]:
        for node in self.graph.nodes:
            state = self.leaf(node) if node.target is None else self.visit(node)
            if node.kind is Kind.CONST and state.coupling in (Coupling.MIXED, Coupling.SUMMED):
                state = _State(Coupling.NONE, state.layout)  # a constant carries no derivative from sample to sample
            if node.index in self.separate and state.layout is not None:
                state = _State(Coupling.SEPARATE, state.layout)
            self.states.append(state)
        return self.states

    def leaf(self, node: Node) -> _State:
        if node.kind is not Kind.INPUT:
            return _NONE
        axis = next((k for k, n in enumerate(node.shape) if n == self.size), None)
        return _NONE if axis is None else _State(Coupling.SEPARATE, BatchLayout(axis, 1, self.size, 1))

    def visit(self, node: Node) -> _State:
        states = [self.states[k] for k in node.inputs]
        batched = [s for s in states if s.layout is not None or s.coupling is not Coupling.NONE]
        if not batched:
            return _NONE
        if all(s.layout is None for s in batched):  # sums over the batch, or tensors whose batch axis was lost
            return self.after_sum(node, batched)
        found = self.family(node)(node)
        if any(s.coupling in (Coupling.MIXED, Coupling.SUMMED) for s in batched):
            return _State(Coupling.MIXED, found.layout)
        return found

    def family(self, node: Node) -> Callable[[Node], _State]:
        op = node.op
        if op in _REDUCTIONS:
            return self.reduction
        if op in _ALONG:
            return self.along
        if op in ("aten.mm.default", "aten.bmm.default"):
            return self.product
        if op in ("aten.convolution.default", "dag_hesse.batch_affine.default"):
            return self.first_axis
        if op == "aten.embedding.default":
            return self.rows
        if op == "aten.gather.default":
            return self.gather
        if _SPATIAL.search(op):
            return self.spatial
        if op in _SAME_SHAPE:
            return self.elementwise
        if node.kind in (Kind.STRUCTURAL, Kind.GATHER) or (node.kind is Kind.CONST and self.moves_data(node)):
            return self.labels
        if node.kind in (Kind.POINTWISE, Kind.PIECEWISE_LINEAR, Kind.CONST):
            return self.elementwise
        return lambda node: _MIXED

    def moves_data(self, node: Node) -> bool:
        from dag_hesse.rules.table import RULES

        rule = RULES.get(node.op)
        return rule is not None and rule.kind in (Kind.STRUCTURAL, Kind.GATHER)

    def after_sum(self, node: Node, states: list[_State]) -> _State:
        if any(s.coupling is Coupling.MIXED for s in states):
            return _MIXED
        mean = any(s.mean for s in states)
        moved = node.kind is Kind.STRUCTURAL or node.op in _LINEAR
        scaled = node.op in ("aten.mul.Tensor", "aten.div.Tensor") and (
            self.states[node.inputs[0]] in states and len(states) == 1
        )
        if node.op in ("aten.div.Tensor", "aten.div.Scalar") and (scaled or moved):
            divisor = node.args[1]
            counts = len(node.inputs) > 1 and self.graph.nodes[node.inputs[1]].kind is Kind.CONST
            mean = mean or counts or (isinstance(divisor, (int, float)) and divisor != 0 and divisor % self.size == 0)
        return _State(Coupling.SUMMED, None, mean) if moved or scaled else _MIXED

    def reduction(self, node: Node) -> _State:
        source = self.states[node.inputs[0]]
        layout, ndim = source.layout, len(self.graph.nodes[node.inputs[0]].shape)
        assert layout is not None
        dims = axes(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), ndim)
        if layout.axis in dims:
            return _State(Coupling.SUMMED, None, "mean" in node.op) if node.op in _SUMS else _MIXED
        shift = 0 if len(node.shape) == ndim else sum(d < layout.axis for d in dims)
        return _State(source.coupling, _moved(layout, layout.axis - shift))

    def along(self, node: Node) -> _State:
        source = self.states[node.inputs[0]]
        position, ndim = _ALONG[node.op], len(self.graph.nodes[node.inputs[0]].shape)
        dims = axes(node.args[position] if len(node.args) > position else node.kwargs.get("dim", -1), ndim)
        assert source.layout is not None
        if source.layout.axis in dims:
            return _State(Coupling.MIXED, source.layout if len(node.shape) == ndim else None)
        shift = 0 if len(node.shape) == ndim else sum(d < source.layout.axis for d in dims)
        return _State(source.coupling, _moved(source.layout, source.layout.axis - shift))

    def product(self, node: Node) -> _State:
        a, b = (self.states[k].layout for k in node.inputs)
        last = len(node.shape) - 1  # rows of a at last - 1, columns of b at last
        if a and b:
            same_stack = last == 2 and a == b and a.axis == 0
            return _State(Coupling.SEPARATE, a) if same_stack else _State(Coupling.MIXED, a if a.axis < last else None)
        layout = a or b
        assert layout is not None
        contracted = last if a else last - 1
        return _MIXED if layout.axis == contracted else _State(Coupling.SEPARATE, layout)

    def first_axis(self, node: Node) -> _State:
        x = self.states[node.inputs[0]]
        alone = all(self.states[k].layout is None for k in node.inputs[1:])
        return _State(Coupling.SEPARATE, x.layout) if x.layout and x.layout.axis == 0 and alone else _MIXED

    def rows(self, node: Node) -> _State:
        table, index = (self.states[k] for k in node.inputs[:2])
        return _MIXED if table.layout or not index.layout else _State(Coupling.SEPARATE, index.layout)

    def gather(self, node: Node) -> _State:
        source = self.states[node.inputs[0]]
        dim = axes(node.args[1], len(node.shape))[0]
        return _MIXED if not source.layout or source.layout.axis == dim else source

    def spatial(self, node: Node) -> _State:
        match = re.search(r"(\d)d", node.op)
        trailing = int(match.group(1)) if match else 2
        source, ndim = self.states[node.inputs[0]], len(self.graph.nodes[node.inputs[0]].shape)
        if source.layout is None or source.layout.axis >= ndim - trailing or len(node.shape) != ndim:
            return _MIXED
        return source

    def elementwise(self, node: Node) -> _State:
        layouts: list[BatchLayout] = []
        for k in node.inputs:
            layout, shape = self.states[k].layout, self.graph.nodes[k].shape
            if layout is not None:
                layouts.append(_moved(layout, layout.axis + len(node.shape) - len(shape)))
        fits = all(0 <= y.axis < len(node.shape) and node.shape[y.axis] == y.outer * y.batch * y.inner for y in layouts)
        if not fits or any(layout != layouts[0] for layout in layouts):
            return _State(Coupling.MIXED, layouts[0] if fits else None)
        return _State(Coupling.SEPARATE, layouts[0])

    def labels(self, node: Node) -> _State:
        if (
            node.op in _ACCUMULATING
            or node.kwargs.get("accumulate")
            or (node.op.endswith("index_put.default") and len(node.args) > 3 and node.args[3])
        ):
            return _MIXED
        values: list[Tensor] = []
        for k in node.inputs:
            parent = self.graph.nodes[k]
            value = (
                self.label(k)
                if parent.is_float or (self.states[k].layout and not self.is_index(node, k))
                else self.constant(k)
            )
            if value is None:
                return _MIXED
            values.append(value)
        if node.op == "aten.constant_pad_nd.default":
            moved = torch.constant_pad_nd(values[0], node.args[1], -1)
        else:
            moved = execute(node, values)
        layout = _find_layout(moved, self.size)
        return _MIXED if layout is None else _State(Coupling.SEPARATE, layout)

    def is_index(self, node: Node, k: int) -> bool:
        """Integer inputs of picking ops are positions; of moving ops they are data like any other."""
        return node.kind is Kind.GATHER or "index" in node.op or "scatter" in node.op or "gather" in node.op

    def label(self, k: int) -> Tensor:
        """The sample number of every element, −1 where it is the same for all samples."""
        layout, shape = self.states[k].layout, self.graph.nodes[k].shape
        if layout is None:
            return torch.full((), -1.0).expand(shape)
        ids = torch.arange(layout.batch, dtype=torch.float32)
        line = ids.repeat_interleave(layout.inner).repeat(layout.outer)
        return line.reshape([-1 if axis == layout.axis else 1 for axis in range(len(shape))]).expand(shape)

    def constant(self, k: int) -> Tensor | None:
        """The value of an integer tensor that depends on nothing but the batch; None if it may depend on more."""
        if k not in self.values:
            self.values[k] = self._evaluate(self.graph.nodes[k])
        return self.values[k]

    def _evaluate(self, node: Node) -> Tensor | None:
        if node.kind is Kind.INPUT:
            return self.tensors[self.graph.inputs[node.index]]
        if node.target is None:
            return self.graph.constants.get(node.index)
        if node.kind is not Kind.CONST or re.search(r"rand|bernoulli|multinomial|_\.", node.op):
            return None
        values = [self.constant(k) for k in node.inputs]
        return None if any(v is None for v in values) else execute(node, [v for v in values if v is not None])


def _moved(layout: BatchLayout, axis: int) -> BatchLayout:
    return BatchLayout(axis, layout.outer, layout.batch, layout.inner)


def _find_layout(labels: Tensor, batch: int) -> BatchLayout | None:
    """The axis along which labels run as outer · batch · inner; None if there is no such axis."""
    free = labels < 0
    for axis, size in enumerate(labels.shape):
        if size % batch:
            continue
        for inner in (k for k in range(1, size // batch + 1) if (size // batch) % k == 0):
            line = torch.arange(size) // inner % batch
            expected = line.reshape([-1 if k == axis else 1 for k in range(labels.ndim)])
            if bool(((labels == expected) | free).all()):
                return BatchLayout(axis, size // (batch * inner), batch, inner)
    return None


def annotate(graph: CurvatureGraph, batch: Batch) -> CurvatureGraph:
    """Fill in ``graph.layouts``, ``graph.couplings`` and ``graph.mean_loss``."""
    states = _Walker(graph, batch).run()
    graph.layouts = [state.layout for state in states]
    graph.couplings = [state.coupling for state in states]
    loss_states = _Walker(graph, batch, frozenset(graph.out)).run()
    graph.mean_loss = loss_states[graph.loss].mean
    graph.separable_loss = batch.size == 1 or (
        loss_states[graph.loss].coupling is Coupling.SUMMED and all(graph.layouts[k] is not None for k in graph.out)
    )
    graph.separable = batch.size == 1 or (
        graph.separable_loss and all(graph.couplings[k] is Coupling.SEPARATE for k in graph.out)
    )
    return graph
