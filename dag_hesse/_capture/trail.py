"""The nodes that a recording writes down: leaves, ops, and what they stand for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dag_hesse._capture.state import Snapshot
from dag_hesse._capture.views import At, Like
from dag_hesse._capture.writes import drawn
from dag_hesse.errors import CaptureError
from dag_hesse.ir import Guard, Kind, Node, Ref
from dag_hesse.rules import RULES

aten = torch.ops.aten
# Values that no derivative reaches, whatever their arguments are.
_CONSTANTS = re.compile(
    r"aten\.(\w+_like|new_\w+|bernoulli|multinomial|histc|bucketize|searchsorted|nextafter|heaviside)\."
)
# Data movement and sums, whose rules hold for complex numbers as they stand.
_COMPLEX = re.compile(
    r"aten\.(reshape|view|_unsafe_view|alias|clone|permute|transpose|t|expand|slice|select|cat|stack|unsqueeze|squeeze|"
    r"add|sub|neg|sum|flip|roll|detach|select_scatter|slice_scatter)\."
)
_INTERNAL = (
    "/torch/",
    "/dag_hesse/_capture/",
    "/dag_hesse/rules/",
    "/dag_hesse/sweep/",
    "/dag_hesse/operators/",
    "/dag_hesse/storage/",
    "/dag_hesse/theory/",
    "/dag_hesse/monitor/",
    "/dag_hesse/options.py",
    "/dag_hesse/_analyze.py",
    "/dag_hesse/_profile.py",
    "/dag_hesse/_structure/",
    "contextlib.py",
)
_PROMOTING = {name for name, rule in RULES.items() if rule.partials is not None} | {"aten.cat.default"}
_VIEWS = {"aten.view.default", "aten._unsafe_view.default", "aten._reshape_alias.default"}


@dataclass
class Trail:
    """Nodes in order, and what they stand for.

    Attributes:
        before: what was there before the run.
        buffers: names of the model's buffers, by id.
        device: where indices are wanted.
        owner: path of the module that runs.
        batch_bound: whether a constant may be of this batch only: it came from outside of PyTorch.
    """

    before: Snapshot
    buffers: dict[int, str]
    device: torch.device
    owner: str = ""
    nodes: list[Node] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    inputs: dict[int, int] = field(default_factory=dict)
    taps: dict[str, list[int]] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)
    batch_bound: bool = False
    _detached: dict[int, int] = field(default_factory=dict)

    def leaf(self, op: str, value: Tensor, kind: Kind, name: str) -> int:
        """A node that no op makes."""
        node = Node(len(self.nodes), op, None, (), {}, (), tuple(value.shape), value.dtype, kind, name=name)
        self.nodes.append(node)
        return node.index

    def constant(self, value: Tensor, name: str) -> int:
        """A leaf that holds a tensor which was not computed here."""
        if value.requires_grad and not value.is_leaf:
            raise CaptureError(
                f"the forward uses a tensor of shape {tuple(value.shape)} that was computed before, with a gradient "
                f"({value.grad_fn}), at {self.line()}: compute it inside the forward, or detach() it."
            )
        known = self.buffers.get(id(value))
        value = value.to(self.device) if name == "index" else value  # it was found on the CPU
        self.batch_bound |= known is None and name == "" and not self.before.knows(value)
        index = self.leaf("const", value, Kind.CONST, known or name or f"constant{len(self.constants)}")
        self.constants[index] = value.detach()
        return index

    def has_past(self, node: int) -> bool:
        """Whether derivatives may pass the node."""
        return self.nodes[node].kind not in (Kind.CONST, Kind.INPUT)

    def detach(self, node: int) -> int:
        """The value of a node, without its past."""
        if not self.has_past(node):
            return node
        if node not in self._detached:
            whole = self.nodes[node]
            self._detached[node] = self.emit(
                aten.detach.default, (At(node),), Like(whole.shape, whole.dtype), constant=True
            )
        return self._detached[node]

    def emit(
        self,
        op: Callable[..., Any],
        args: Sequence[Any],
        like: Any,
        *,
        kwargs: dict[str, Any] | None = None,
        output: int | None = None,
        constant: bool = False,
    ) -> int:
        """A node that runs ``op``; ``constant``: no derivative passes."""
        inputs: list[int] = []

        def place(arg: Any) -> Any:
            if isinstance(arg, At):
                inputs.append(arg.node)
                return Ref(len(inputs) - 1)
            if isinstance(arg, Tensor):
                inputs.append(self.literal(arg))
                return Ref(len(inputs) - 1)
            if isinstance(arg, (list, tuple)):
                return [place(item) for item in arg] if isinstance(arg, list) else tuple(place(item) for item in arg)
            return arg

        name = name_of(op)
        if name in _PROMOTING and like.dtype.is_floating_point:
            args = [self.cast(arg, like.dtype) for arg in args]
        placed = tuple(place(arg) for arg in args)
        options = {key: place(arg) for key, arg in (kwargs or {}).items()}
        kind = Kind.CONST if constant else self._kind(name, inputs, like.dtype)
        op = aten.reshape.default if name in _VIEWS else op
        node = Node(
            index=len(self.nodes), op=name, target=op, args=placed, kwargs=options, inputs=tuple(inputs),
            shape=tuple(like.shape), dtype=like.dtype, kind=kind, output=output, owner=self.owner,
            line=self.line(), draws=drawn(op),
        )  # fmt: skip
        self.nodes.append(node)
        return node.index

    def dtype(self, node: int) -> torch.dtype:
        """Of a node's value."""
        return self.nodes[node].dtype

    def cast(self, arg: Any, dtype: torch.dtype) -> Any:
        """A node of another floating-point type as one of ``dtype``: what an op that promotes types does inside."""
        if isinstance(arg, list):
            return [self.cast(item, dtype) for item in arg]
        if not isinstance(arg, At) or self.dtype(arg.node) == dtype or not self.dtype(arg.node).is_floating_point:
            return arg
        like = Like(self.nodes[arg.node].shape, dtype)
        return At(self.emit(aten._to_copy.default, (arg,), like, kwargs={"dtype": dtype}))

    def _kind(self, name: str, inputs: list[int], dtype: torch.dtype) -> Kind:
        nodes = self.nodes
        if not (dtype.is_floating_point or dtype.is_complex) or _CONSTANTS.match(name):
            return Kind.CONST
        if not any(nodes[k].kind is not Kind.CONST and nodes[k].is_float for k in inputs):
            return Kind.CONST
        types = {dtype, *(nodes[k].dtype for k in inputs if nodes[k].is_float)}
        if any(t.is_complex for t in types) and (len(types) > 1 or not _COMPLEX.match(name)):
            return Kind.OPAQUE
        return RULES[name].kind if name in RULES else Kind.OPAQUE

    def literal(self, value: Tensor) -> int:
        """A leaf for a tensor that a lowering made up."""
        return self.constant(value, "literal")

    def line(self) -> str:
        """The innermost line of the user's own code."""
        frame = sys._getframe(2)
        while frame is not None:
            path = frame.f_code.co_filename
            if not is_internal(path):
                return f"{path}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return ""


@cache
def is_internal(path: str) -> bool:
    """Whether a file of code is PyTorch's, or part of the recording."""
    return path.startswith("<") or any(part in path for part in _INTERNAL)


def name_of(op: Any) -> str:
    """The name that an op has in rules and messages."""
    if isinstance(op, torch._ops.OpOverload):
        return str(op)
    owner = getattr(op, "__self__", None)  # the class of a custom function
    return f"function.{owner.__name__}.apply" if isinstance(owner, type) else str(op)
