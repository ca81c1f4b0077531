"""From the traced fx graph to the typed IR."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from dag_hesse.capture.tracer import LOSS_INPUT, OUTPUT
from dag_hesse.errors import CaptureError
from dag_hesse.ir import CurvatureGraph, Kind, Node, Ref
from dag_hesse.ir.ops import TAP
from dag_hesse.rules import RULES

# Float-valued ops through which autograd passes nothing: their results are constants.
_CUT = re.compile(
    r"aten\.(detach|zeros_like|ones_like|full_like|empty_like|rand_like|randn_like|new_\w+|bernoulli\w*|"
    r"multinomial|histc|bucketize|searchsorted|nextafter|heaviside|one_hot|empty\w*|zeros|ones|full|arange|"
    r"scalar_tensor|rand|randn|linspace|eye)\."
)
# A view depends on strides, which tangents and adjoints need not share with the traced tensors.
_VIEWS = {"aten.view.default", "aten._unsafe_view.default", "aten._reshape_alias.default"}
_INTERNAL = ("/torch/", "dag_hesse/capture", "dag_hesse/rules", "dag_hesse/ir", "dag_hesse/analyze")


class _Converter:
    def __init__(self, gm: fx.GraphModule, model: nn.Module) -> None:
        self.gm = gm
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.buffers = {id(b): name for name, b in model.named_buffers()}
        self.nodes: list[Node] = []
        self.index: dict[fx.Node, int] = {}
        self.leaves: dict[int, int] = {}  # id(tensor) -> node, so that a tied parameter is one node
        self.constants: dict[int, Tensor] = {}
        self.parameter_nodes: dict[str, int] = {}
        self.inputs: dict[int, int] = {}
        self.taps: dict[str, list[int]] = {}

    def add(self, op: str, like: Any, kind: Kind, **fields: Any) -> int:
        defaults: dict[str, Any] = {"target": None, "args": (), "kwargs": {}, "inputs": ()}
        node = Node(
            index=len(self.nodes), op=op, shape=tuple(like.shape), dtype=like.dtype, kind=kind, **{**defaults, **fields}
        )
        self.nodes.append(node)
        return node.index

    def leaf(self, tensor: Tensor, fallback: str) -> int:
        if id(tensor) in self.leaves:
            return self.leaves[id(tensor)]
        name = self.parameters.get(id(tensor))
        if name is not None and tensor.is_floating_point():
            index = self.parameter_nodes[name] = self.add("param", tensor, Kind.PARAM, name=name)
        else:
            index = self.add("const", tensor, Kind.CONST, name=self.buffers.get(id(tensor), name or fallback))
            self.constants[index] = tensor
        self.leaves[id(tensor)] = index
        return index

    def call(self, node: fx.Node, position: int | None = None, value: Any = None) -> int:
        inputs: list[int] = []

        def place(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                inputs.append(self.index[arg])
                return Ref(len(inputs) - 1)
            if isinstance(arg, (list, tuple)):
                return type(arg)(place(item) for item in arg)
            if isinstance(arg, torch.fx.immutable_collections.immutable_list):
                return [place(item) for item in arg]
            return arg

        args = tuple(place(arg) for arg in node.args)
        kwargs = {key: place(arg) for key, arg in node.kwargs.items()}
        like = node.meta["val"] if value is None else value
        op = str(node.target)
        return self.add(
            op,
            like,
            self.kind_of(op, inputs, like),
            target=torch.ops.aten.reshape.default if op in _VIEWS else node.target,
            args=args,
            kwargs=kwargs,
            inputs=tuple(inputs),
            output=position,
            owner=(node.meta.get("custom") or {}).get("module", ""),
            source=_source(node.stack_trace),
        )

    def kind_of(self, op: str, inputs: list[int], like: Any) -> Kind:
        differentiable = any(self.nodes[k].kind is not Kind.CONST and self.nodes[k].is_float for k in inputs)
        if not like.dtype.is_floating_point or _CUT.match(op):
            return Kind.CONST
        if op == TAP:  # a tapped constant can be perturbed, so derivatives may start here
            return Kind.STRUCTURAL
        if not differentiable:
            return Kind.CONST
        return RULES[op].kind if op in RULES else Kind.OPAQUE

    def tap(self, node: fx.Node) -> int:
        source, name = node.args
        assert isinstance(source, fx.Node) and isinstance(name, str)
        index = self.index[source]
        # The mark needs no node of its own unless somebody else reads the unmarked tensor too.
        readers = [user for user in source.users if user.users or not _is_tap(user)]
        if (len(readers) > 1 and node.users) or self.nodes[index].kind in (Kind.CONST, Kind.INPUT, Kind.PARAM):
            index = self.call(node)
        self.taps.setdefault(name, []).append(index)
        return index

    def run(self) -> int:
        pending: dict[fx.Node, Any] = {}
        placeholders = 0
        result = None
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.index[node] = self.add("input", node.meta["val"], Kind.INPUT, name=node.name)
                self.inputs[self.index[node]] = placeholders
                placeholders += 1
            elif node.op == "get_attr":
                self.index[node] = self.leaf(_attribute(self.gm, node.target), node.name)
            elif node.op == "output":
                result = node.args[0]
            elif node.target is operator.getitem:
                source, position = node.args
                self.index[node] = self.call(source, position, pending[source][position])
            elif _is_tap(node):
                self.index[node] = self.tap(node)
            elif isinstance(node.meta.get("val"), (tuple, list)):
                pending[node] = node.meta["val"]
            elif isinstance(node.meta.get("val"), Tensor):
                self.index[node] = self.call(node)
        if not isinstance(result, fx.Node):
            raise CaptureError("the loss does not depend on the batch or on any parameter: nothing was traced.")
        return self.index[result]


def _is_tap(node: fx.Node) -> bool:
    return node.target is torch.ops.dag_hesse.tap.default


def _attribute(gm: fx.GraphModule, path: str) -> Tensor:
    return operator.attrgetter(path)(gm)


def _source(stack_trace: str | None) -> str:
    """The innermost line of the user's own code in a recorded stack."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack_trace or "")
    own = [f"{path}:{line}" for path, line in frames if not any(part in path for part in _INTERNAL)]
    return own[-1] if own else ""


def convert(
    gm: fx.GraphModule, model: nn.Module, called: dict[str, str], batch_size: int, output: str | None
) -> CurvatureGraph:
    """Type the traced graph and drop what the loss does not read.

    Raises:
        CaptureError: the loss depends on nothing, or ``out`` cannot be told (then ``output=`` must name it).
    """
    # Tracing leaves detached copies behind, which would count as readers of what they copy.
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or _is_tap(node))
    converter = _Converter(gm, model)
    loss = converter.run()
    graph = CurvatureGraph(
        nodes=converter.nodes,
        loss=loss,
        out=(),
        batch_size=batch_size,
        parameters=converter.parameter_nodes,
        inputs=converter.inputs,
        constants=converter.constants,
        taps={name: tuple(sites) for name, sites in converter.taps.items()},
        modules=called,
    )
    graph.out = _find_out(graph, output)
    return _prune(graph)


def _find_out(graph: CurvatureGraph, output: str | None) -> tuple[int, ...]:
    """The nodes that the loss consumes (design §2.2)."""
    reaches = graph.ancestors([graph.loss])
    if output is not None:
        if output not in graph.taps:
            from dag_hesse.errors import PointError, suggest

            raise PointError(f"output={output!r} names no module or tap. {suggest(output, graph.taps)}")
        return tuple(dict.fromkeys(graph.taps[output]))
    outputs = {
        name: site for name, sites in graph.taps.items() if name.startswith(OUTPUT) for site in sites if reaches[site]
    }
    loss_like = graph.descendants([graph.loss])
    outputs = {name: site for name, site in outputs.items() if not loss_like[site]}
    logits = outputs.get(f"{OUTPUT}.logits")
    own = f"{OUTPUT}.loss" in graph.taps or graph.loss in graph.taps.get(OUTPUT, ())
    if own:
        found = [logits] if logits is not None else [s for s in graph.taps.get(LOSS_INPUT, ()) if reaches[s]]
    else:
        found = list(outputs.values())
    if not found:
        raise CaptureError(
            "the model returns its own loss but no logits, and no known loss function was seen: name the module or tap "
            "that the loss consumes with output=."
        )
    return tuple(dict.fromkeys(found))


def _prune(graph: CurvatureGraph) -> CurvatureGraph:
    """Drop nodes that the loss does not depend on, and renumber."""
    needed = [False] * len(graph.nodes)
    needed[graph.loss] = True
    for node in reversed(graph.nodes):
        if needed[node.index]:
            for parent in node.inputs:
                needed[parent] = True
    place = {old: new for new, old in enumerate(k for k, keep in enumerate(needed) if keep)}
    nodes = [node for node in graph.nodes if needed[node.index]]
    for node in nodes:
        node.index, node.inputs = place[node.index], tuple(place[k] for k in node.inputs)
    taps = {
        name.replace(OUTPUT, "output"): tuple(place[k] for k in sites if k in place)
        for name, sites in sorted(graph.taps.items(), key=lambda item: item[0].startswith(OUTPUT))
        if name != LOSS_INPUT and not (name.startswith(OUTPUT) and name.replace(OUTPUT, "output") in graph.taps)
    }
    unread = frozenset(name for name, sites in taps.items() if not sites)
    taps = {name: sites for name, sites in taps.items() if sites}
    for name, sites in taps.items():
        for call, site in enumerate(sites):
            nodes[site].taps.append(name if len(sites) == 1 else f"{name}[{call}]")
    return CurvatureGraph(
        nodes=nodes,
        loss=place[graph.loss],
        out=tuple(place[k] for k in graph.out),
        batch_size=graph.batch_size,
        parameters={name: place[k] for name, k in graph.parameters.items() if k in place},
        inputs={place[k]: position for k, position in graph.inputs.items() if k in place},
        constants={place[k]: tensor for k, tensor in graph.constants.items() if k in place},
        taps=taps,
        modules=graph.modules,
        unread=unread,
    )
