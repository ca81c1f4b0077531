"""A bias added to a matrix product becomes its third operand: one pass over memory less. Graph in, graph out."""

from __future__ import annotations

from dataclasses import replace

from dag_hesse.ir import CurvatureGraph, Kind, Node, Ref
from dag_hesse.ir.ops import mm_bias
from dag_hesse.plan.simplify import seeded_or_read, without


def fuse_biases(graph: CurvatureGraph) -> CurvatureGraph:
    """The same function, where a product on the way of derivatives and the bias added to it are one node."""
    kept, in_loss = seeded_or_read(graph), graph.loss_subgraph
    active = graph.active(kept - {graph.loss})
    changed, gone = dict[int, Node](), set[int]()
    for node in graph.nodes:
        product = _product(graph, node)
        if product is None or product.index in kept or not active[product.index]:
            continue
        if in_loss[product.index] != in_loss[node.index]:  # then its second-order term is of the other channel
            continue
        a, b = (product.inputs[arg.slot] for arg in product.args)
        bias = next(k for k in node.inputs if k != product.index)
        operands = (Ref(0), Ref(1), Ref(2))
        changed[node.index] = replace(
            node, op=str(mm_bias), target=mm_bias, args=operands, inputs=(a, b, bias), kind=Kind.CONTRACTION
        )
        gone.add(product.index)
    return without(graph, gone, changed)


def _product(graph: CurvatureGraph, node: Node) -> Node | None:
    """The matrix product to whose columns ``node`` adds one number each, if it does that and is its only child."""
    if node.op != "aten.add.Tensor" or node.kind is Kind.CONST or node.kwargs or len(set(node.inputs)) != 2:
        return None
    for product, bias in ((graph.nodes[i], graph.nodes[j]) for i, j in (node.inputs, node.inputs[::-1])):
        alone = product.op == "aten.mm.default" and graph.children[product.index] == [node.index]
        fits = product.shape == node.shape and bias.shape == product.shape[1:]
        if alone and fits and product.kind is Kind.CONTRACTION and product.dtype == bias.dtype:
            return product
    return None
