"""A product as two ATen graphs: what is prepared of the leaves once, and what a sweep does then (design §3, compile).

Linearization and sweep are traced together, every kernel by its definition, as functions of the leaves' values and of
the seeds. What depends on no seed is the preparation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tag, Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dag_hesse.errors import CompileError
from dag_hesse.ir.ops import DEFINITIONS
from dag_hesse.kernels.dispatch import as_defined

Program = Callable[[list[Tensor], list[Tensor]], list[Tensor]]  # (leaves, seeds) -> results
_BY_VALUES = (Tag.dynamic_output_shape, Tag.data_dependent_output)


def traced(program: Program, leaves: Sequence[Tensor], seeds: Sequence[Tensor]) -> fx.GraphModule:
    """The program as a graph of ATen ops that write to nothing; inputs are the leaves, then the seeds.

    Raises:
        CompileError: it looks at values.
    """
    functional = torch.func.functionalize(program, remove="mutations")
    with as_defined(), torch.no_grad():
        try:
            trace = make_fx(functional, DEFINITIONS, tracing_mode="fake", _allow_non_fake_inputs=True)
            made = trace(list(leaves), list(seeds))
        except RuntimeError as error:
            raise CompileError(f"what is computed depends on values in a way that no program has: {error}") from error
    for node in made.graph.nodes:
        by_values = any(tag in _BY_VALUES for tag in getattr(node.target, "tags", ()))
        if by_values and node.target is not torch.ops.aten.index.Tensor:  # by masks, which rules turn into places
            raise CompileError(f"{node.target} gives a result whose shape is decided by values.")
    made.graph.eliminate_dead_code()
    return made


def split(whole: fx.GraphModule, leaves: int) -> tuple[fx.GraphModule, fx.GraphModule, list[int]]:
    """(preparation, product, leaves): a graph cut where its seeds come in; its first inputs are ``leaves`` many leaves.

    The preparation takes all leaves. The product takes what that returns, the leaves that are listed, and the seeds.
    The first result of the whole is the preparation's; views are made where they are used.
    """
    nodes = list(whole.graph.nodes)
    given, seeds = nodes[:leaves], [node for node in nodes[leaves:] if node.op == "placeholder"]
    first, *results = nodes[-1].args[0]
    moving = set(seeds)
    for node in nodes:
        if not moving.isdisjoint(node.all_input_nodes):
            moving.add(node)
    body = [node for node in nodes[leaves + len(seeds) : -1] if node in moving]
    late: dict[fx.Node, None] = {}  # nothing of the seeds, yet made with the product
    kept: dict[fx.Node, None] = {}

    def need(node: fx.Node) -> None:
        if node in moving or node in kept or node in late:
            return
        if not _is_view(node):
            kept[node] = None
            return
        for of in node.all_input_nodes:
            need(of)
        late[node] = None

    for node in (*(x for one in body for x in one.all_input_nodes), *results):
        need(node)
    saved = [node for node in kept if node not in given]
    used = [k for k, node in enumerate(given) if node in kept]
    prepare = _part(whole, given, [n for n in nodes[leaves + len(seeds) : -1] if n not in moving], [first, *saved])
    product = _part(whole, [*saved, *(given[k] for k in used), *seeds], [*late, *body], results)
    return prepare, product, used


def _is_view(node: fx.Node) -> bool:
    """Whether a node costs nothing: a constant, or a result that lies in the memory of its input."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "get_attr" or (schema is not None and any(r.alias_info is not None for r in schema.returns))


def _part(
    of: fx.GraphModule, inputs: Sequence[fx.Node], body: Sequence[fx.Node], results: Sequence[fx.Node]
) -> fx.GraphModule:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for k, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"input_{k}")
        copies[node].meta = dict(node.meta)
    for node in body:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    graph.eliminate_dead_code()
    return fx.GraphModule(of, graph)
