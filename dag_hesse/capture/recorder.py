"""A recording of what a forward dispatched, as nodes without side effects (design §3, capture).

The real forward runs on the real batch; below autograd every op passes here with its tensors. Whether a derivative
passes a tensor that was detached is what autograd says of it (``requires_grad``), so that its own detached copies, of
which derivatives inside a forward are made, are told from the user's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dag_hesse.capture.aliases import Aliases, At, Like, Step, by_place, geometry
from dag_hesse.capture.lower import Given, Made, Recipe, recipe
from dag_hesse.capture.state import Snapshot
from dag_hesse.capture.writes import Pure, Written, drawn, functional, statistics, view_step
from dag_hesse.errors import CaptureError
from dag_hesse.ir import Guard, Kind, Node, Ref, ops
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
_INTERNAL = ("/torch/", "/dag_hesse/capture/", "/dag_hesse/rules/", "/dag_hesse/sweep/", "contextlib.py")


@dataclass
class Trail:
    """What a recording leaves: nodes in order, and what they stand for."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    inputs: dict[int, int] = field(default_factory=dict)
    taps: dict[str, list[int]] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)
    fresh: bool = False  # whether a constant may be of this batch only: it came from outside of PyTorch


class Recorder(TorchDispatchMode):
    """Records the ops that run while it is entered.

    Attributes:
        trail: what was recorded.
        owner: path of the module that runs.
        before: what was there before; tensors of it that the run writes to are noted there.
    """

    def __init__(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], before: Snapshot) -> None:
        super().__init__()
        self.trail, self.owner, self.before = Trail(), "", before
        self.aliases = Aliases(self)
        self.device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.paused, self.anchors, self._marking = 0, True, ""
        self.running = ""  # the op that runs now
        self.numbers = False  # whether tensors were made of Python's numbers
        self._known = {id(b): name for name, b in buffers.items()}
        self._cuts: dict[int, int] = {}
        self._literals: dict[Any, int] = {}
        for name, p in parameters.items():
            index = self._leaf("param", p, Kind.PARAM, name)
            self.trail.parameters[name] = index
            self.aliases.add(p, index, foreign=True)

    # --- nodes ------------------------------------------------------------------------------------------------------

    def _leaf(self, op: str, value: Tensor, kind: Kind, name: str) -> int:
        node = Node(len(self.trail.nodes), op, None, (), {}, (), tuple(value.shape), value.dtype, kind, name=name)
        self.trail.nodes.append(node)
        return node.index

    def input(self, x: Tensor, position: int) -> None:
        """``x`` is the batch's tensor at ``position``."""
        index = self._leaf("input", x, Kind.INPUT, f"input{position}")
        self.trail.inputs[index] = position
        self.aliases.add(x, index)

    def constant(self, value: Tensor, name: str) -> int:
        """A leaf that holds a tensor which was not computed here."""
        if value.requires_grad and not value.is_leaf:
            raise CaptureError(
                f"the forward reads a tensor of shape {tuple(value.shape)} that was computed before, with a gradient "
                f"({value.grad_fn}), at {self._source()}: compute it inside the forward, or detach() it."
            )
        known = self._known.get(id(value))
        value = value.to(self.device) if name == "index" else value  # it was found on the CPU
        self.trail.fresh |= known is None and name == "" and not self.before.knows(value)
        index = self._leaf("const", value, Kind.CONST, known or name or f"constant{len(self.trail.constants)}")
        self.trail.constants[index] = value.detach()
        return index

    def has_past(self, node: int) -> bool:
        """Whether derivatives may pass the node."""
        return self.trail.nodes[node].kind not in (Kind.CONST, Kind.INPUT)

    def cut(self, node: int) -> int:
        """The value of a node, without its past."""
        if not self.has_past(node):
            return node
        if node not in self._cuts:
            source = self.trail.nodes[node]
            self._cuts[node] = self.emit(
                aten.detach.default, (At(node),), Like(source.shape, source.dtype), constant=True
            )
        return self._cuts[node]

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

        name = _name(op)
        if name in _PROMOTING and like.dtype.is_floating_point:
            args = [self._cast(arg, like.dtype) for arg in args]
        placed = tuple(place(arg) for arg in args)
        options = {key: place(arg) for key, arg in (kwargs or {}).items()}
        kind = Kind.CONST if constant else self._kind(name, inputs, like.dtype)
        op = aten.reshape.default if name in _VIEWS else op
        node = Node(
            index=len(self.trail.nodes), op=name, target=op, args=placed, kwargs=options, inputs=tuple(inputs),
            shape=tuple(like.shape), dtype=like.dtype, kind=kind, output=output, owner=self.owner,
            source=self._source(), draws=drawn(op),
        )  # fmt: skip
        self.trail.nodes.append(node)
        return node.index

    def dtype(self, node: int) -> torch.dtype:
        """Of a node's value."""
        return self.trail.nodes[node].dtype

    def _cast(self, arg: Any, dtype: torch.dtype) -> Any:
        """A node of another floating-point type as one of ``dtype``: what an op that promotes types does inside."""
        if isinstance(arg, list):
            return [self._cast(item, dtype) for item in arg]
        if not isinstance(arg, At) or self.dtype(arg.node) == dtype or not self.dtype(arg.node).is_floating_point:
            return arg
        like = Like(self.trail.nodes[arg.node].shape, dtype)
        return At(self.emit(aten._to_copy.default, (arg,), like, kwargs={"dtype": dtype}))

    def _kind(self, name: str, inputs: list[int], dtype: torch.dtype) -> Kind:
        nodes = self.trail.nodes
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

    def _source(self) -> str:
        """The innermost line of the user's own code."""
        frame = sys._getframe(2)
        while frame is not None:
            path = frame.f_code.co_filename
            if not is_internal(path):
                return f"{path}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return ""

    # --- tensors ----------------------------------------------------------------------------------------------------

    def read(self, x: Tensor) -> int:
        """The node of an argument."""
        if not self.aliases.knows(x):
            self.aliases.add(x, self.constant(x, ""), foreign=True)
        return self.aliases.read(x)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs inside leaves no nodes."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def tap(self, x: Tensor, name: str) -> Tensor:
        """Mark ``x``: the tensor returned is another one with its value and memory, and a node of its own.

        Where autograd has no use for ``x``, it is given a past that starts here.
        """
        if not torch.is_grad_enabled() or not (x.is_floating_point() or x.is_complex()):
            return x
        self._marking = name
        try:
            if x.requires_grad or not self.anchors:
                return aten.alias.default(x)
            return x + torch.zeros((), dtype=x.dtype, device=x.device).requires_grad_()
        finally:
            self._marking = ""

    def _mark(self, op: Any, x: Tensor, result: Tensor) -> None:
        name, like = self._marking, Like(tuple(x.shape), x.dtype)
        self._marking = ""  # a function transform does more of the same kind to other tensors
        if op is aten.alias.default:
            index = self.aliases.add_view(result, x, Step(ops.tap, (name,), like, like))
        elif op is aten.add.Tensor:
            index = self.emit(ops.tap, (At(self.read(x)), name), like)
            self.aliases.add(result, index)
        else:
            return
        if result.requires_grad or op is aten.add.Tensor:  # derivatives may start at a constant that is marked
            self.trail.nodes[index].kind = Kind.STRUCTURAL
        self.trail.taps.setdefault(name, []).append(index)

    # --- ops --------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in _flat((args, tuple(kwargs.values()))) if isinstance(x, Tensor)]
        updated = statistics(op, args)
        mutated = [] if updated else _mutated(op, args, kwargs)
        for x in [*mutated, *(updated[:2] if updated else ())]:
            self._save(x)
        if self.paused:
            return op(*args, **kwargs)
        if self._marking and op in (aten.alias.default, aten.add.Tensor):
            result = op(*args, **kwargs)
            self._mark(op, args[0], result)
            return result
        self._check(op, args, tensors)
        if op is aten.lift_fresh.default and not self.aliases.knows(args[0]):  # torch.tensor(numbers)
            self.aliases.add(args[0], self.constant(args[0], "numbers"), foreign=True)
            self.numbers = True
        nodes = {id(x): self.read(x) for x in tensors}
        self.running = _name(op)
        result = op(*args, **kwargs)
        self.running = ""
        if mutated:
            self._write(op, args, kwargs, nodes, mutated, result)
        else:
            self._note(op, args, kwargs, nodes, result)
        if updated:
            self._update(args[0], *updated, nodes)
        return result

    def _check(self, op: Any, args: Any, tensors: Sequence[Tensor]) -> None:
        if any(x.layout is not torch.strided for x in tensors):
            raise CaptureError(
                f"{_name(op)} at {self._source()} takes a sparse tensor, which has no nodes: use a dense one."
            )
        if op is aten.embedding.default and len(args) > 3 and args[3]:
            raise CaptureError(
                f"aten.embedding at {self._source()} divides gradients by frequencies (scale_grad_by_freq=True), so "
                "its 'gradient' is no derivative: leave that option out."
            )

    def _save(self, x: Tensor) -> None:
        if self.aliases.is_foreign(x):
            self.aliases.storage(x, foreign=True)
            if all(w.tensor is not x for w in self.before.written):
                self.before.written.append(Written.of(x))

    def _note(self, op: Any, args: Any, kwargs: Any, nodes: dict[int, int], result: Any) -> None:
        """Nodes of an op that writes to nothing."""
        found = list(_flat(result))
        tensors = [x for x in _flat((args, tuple(kwargs.values()))) if isinstance(x, Tensor)]
        places = {x.untyped_storage()._cdata: x for x in reversed(tensors) if x.numel()}
        fresh: list[tuple[int, Tensor]] = []
        for number, x in enumerate(found):
            if not isinstance(x, Tensor):
                self._guard(op, args, nodes, x)
            elif any(x is t for t in tensors):
                continue
            elif x.numel() and (source := places.get(x.untyped_storage()._cdata)) is not None:
                step = view_step(op, args, kwargs, source, x, number)
                apart = op is aten.detach.default
                off = apart or not torch.is_grad_enabled()
                self.aliases.add_view(x, source, step, apart=apart, detached=off)
            else:
                fresh.append((number, x))
        if fresh:
            values = self._values(op, args, kwargs, nodes, fresh, isinstance(result, Tensor))
            for (_, x), node in zip(fresh, values, strict=True):
                self.aliases.add(x, node)

    def _values(
        self,
        op: Any,
        args: Any,
        kwargs: Any,
        nodes: dict[int, int],
        fresh: Sequence[tuple[int, Any]],
        single: bool,
    ) -> list[int]:
        """Nodes that hold outputs of ``op``, by number."""
        if op is aten.native_dropout.default and args[2] is not False:
            return self._dropout(args, nodes, fresh)
        constant = not torch.is_grad_enabled() or drawn(op)
        plain = constant or not any(self.has_past(k) for k in nodes.values())
        written = None if plain and statistics(op, args) is None else recipe(op, args, kwargs)
        if written is not None:
            made = self._follow(written, args, kwargs, nodes, constant)
            results = [made[number] for number, _ in fresh]
            if all(k is not None for k in results):
                return results  # type: ignore[return-value]
        where = [_placed(arg, nodes) for arg in args]
        options = {key: _placed(arg, nodes) for key, arg in kwargs.items()}
        return [
            self.emit(op, where, x, kwargs=options, output=None if single else number, constant=constant)
            for number, x in fresh
        ]

    def _dropout(self, args: Any, nodes: dict[int, int], fresh: Sequence[tuple[int, Any]]) -> list[int]:
        """Fused dropout: the mask is drawn by a node of its own, which nothing differentiates."""
        x, constant = nodes[id(args[0])], not torch.is_grad_enabled()
        like, masked = Like(tuple(args[0].shape), args[0].dtype), Like(tuple(args[0].shape), torch.bool)
        mask = self.emit(aten.native_dropout.default, (At(x), *args[1:]), masked, output=1, constant=True)
        factor = self.emit(aten._to_copy.default, (At(mask),), like, kwargs={"dtype": like.dtype}, constant=True)
        kept = self.emit(aten.mul.Tensor, (At(x), At(factor)), like, constant=constant)
        scale = 1 / (1 - args[1]) if args[1] < 1 else 0.0
        found = {0: self.emit(aten.mul.Scalar, (At(kept), scale), like, constant=constant), 1: mask}
        return [found[number] for number, _ in fresh]

    def _follow(
        self, written: Recipe, args: Any, kwargs: Any, nodes: dict[int, int], constant: bool
    ) -> list[int | None]:
        tensors = [x for x in _flat((args, tuple(kwargs.values()))) if isinstance(x, Tensor)]
        made: list[int] = []
        for number in written.integers:
            self._only_for(tensors[number], nodes[id(tensors[number])])

        def at(arg: Any) -> Any:
            if isinstance(arg, Given):
                return At(nodes[id(tensors[arg.number])])
            if isinstance(arg, Made):
                return At(made[arg.number])
            if isinstance(arg, (list, tuple)):
                return type(arg)(at(item) for item in arg)
            return arg

        for call in written.calls:
            options = {key: at(arg) for key, arg in call.kwargs.items()}
            cut = constant or call.op is aten.detach.default
            made.append(self.emit(call.op, at(call.args), call.like, kwargs=options, output=call.output, constant=cut))
        found: list[int | None] = []
        for x in written.results:
            place = at(x)
            found.append(
                place.node if isinstance(place, At) else self.literal(place) if isinstance(place, Tensor) else None
            )
        return found

    def _write(
        self, op: Any, args: Any, kwargs: Any, nodes: dict[int, int], mutated: list[Tensor], result: Any
    ) -> None:
        """Nodes of an op that writes into its arguments."""
        if torch.Tag.inplace_view in op.tags:
            self._reshape(op, args[0])
            return
        pure, seen = functional(op), torch.is_grad_enabled()
        if op in _NOISY and args[4]:
            noise = self.emit(Pure(op, (1,)), [_placed(arg, nodes) for arg in args[:5]], args[1], constant=True)
            out = self.emit(aten.mul.Tensor, (At(nodes[id(args[0])]), At(noise)), args[0], constant=not seen)
            values = [noise if x is args[1] else out for x in mutated]
            if op is aten.rrelu_with_noise.default:
                self.aliases.add(result, out)
            result = ()
        elif drawn(op) and kwargs.get("generator") is not None:  # one's own generator: its draws are constants
            values = [self.constant(x.detach().clone(), "") for x in mutated]
        else:
            given, options = pure.arguments(args, kwargs)
            fresh = [(k, Like(tuple(x.shape), _promoted(x, args))) for k, x in enumerate(mutated)]
            values = self._values(pure.op, given, options, nodes, fresh, pure.single)
            values = [self._cast(At(k), x.dtype).node for k, x in zip(values, mutated, strict=True)]
        others = [
            (number, x)
            for number, x in enumerate(_flat(result))
            if isinstance(x, Tensor) and _place(x, mutated) is None
        ]
        if others:
            rest = self._values(op, args, kwargs, nodes, others, False)
            for (_, x), node in zip(others, rest, strict=True):
                self.aliases.add(x, node)
        for x, value in zip(mutated, values, strict=True):
            if geometry(x) == self.aliases.tensors[x].geometry:
                self.aliases.write(x, value, seen_by_autograd=seen)
            else:
                self.aliases.replace(x, value)

    def _reshape(self, op: Any, x: Tensor) -> None:
        alias = self.aliases.tensors[x]
        step = by_place(alias.geometry, x, x.dtype)
        if step is None:
            raise CaptureError(f"{_name(op)} at {self._source()} gives a tensor other memory: not supported.")
        self.aliases.reshaped(x, step)

    def _update(self, x: Tensor, mean: Tensor, var: Tensor, momentum: float, nodes: dict[int, int]) -> None:
        """Running statistics, which batch normalization writes without saying so."""
        dims, source = [0, *range(2, x.ndim)], At(nodes[id(x)])
        like = Like((x.shape[1],), x.dtype)
        new = {
            mean: self.emit(aten.mean.dim, (source, dims), like, constant=True),
            var: self.emit(aten.var.correction, (source, dims), like, kwargs={"correction": 1}, constant=True),
        }
        for old, batch in new.items():
            cast = self.emit(aten._to_copy.default, (At(batch),), old, kwargs={"dtype": old.dtype}, constant=True)
            value = self.emit(aten.lerp.Scalar, (At(nodes[id(old)]), At(cast), momentum), old, constant=True)
            self.aliases.write(old, value, seen_by_autograd=False)

    def _guard(self, op: Any, args: Any, nodes: dict[int, int], value: Any) -> None:
        """Python looked at a value: the recording holds as long as that is the same."""
        if op is aten._local_scalar_dense.default:
            self.trail.guards.append(Guard(nodes[id(args[0])], value))
        elif op is aten.equal.default:
            a, b = (At(nodes[id(x)]) for x in args)
            same = self.emit(aten.eq.Tensor, (a, b), Like(tuple(args[0].shape), torch.bool), constant=True)
            all_same = self.emit(aten.all.default, (At(same),), Like((), torch.bool), constant=True)
            if args[0].shape == args[1].shape:
                self.trail.guards.append(Guard(all_same, value))

    def copies(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A function that gives back what it is given."""
        with self.pause():
            result = run(*args)
        for old, new in zip(args, _flat(result), strict=True):
            if isinstance(old, Tensor) and new is not old:
                like = Like(tuple(old.shape), old.dtype)
                self.read(old)
                self.aliases.add_view(new, old, Step(aten.alias.default, (), like, like))
        return result

    def _only_for(self, x: Tensor, node: int) -> None:
        """What follows was written for these integers."""
        self.trail.fresh = True
        like = Like(tuple(x.shape), torch.bool)
        seen = self.constant(x.detach().clone(), "literal")
        same = self.emit(aten.eq.Tensor, (At(node), At(seen)), like, constant=True)
        self.trail.guards.append(
            Guard(self.emit(aten.all.default, (At(same),), Like((), torch.bool), constant=True), True)
        )

    def function(self, cls: Any, args: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        """A custom ``autograd.Function``: one opaque node an output, differentiated through its own backward."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        nodes = {id(x): self.read(x) for x in tensors}
        with self.pause():
            result = run()
        outputs = [result] if isinstance(result, Tensor) else list(result)
        where = tuple(At(nodes[id(x)]) if isinstance(x, Tensor) else x for x in args)
        for number, x in enumerate(outputs):
            if not isinstance(x, Tensor):
                continue
            output = None if isinstance(result, Tensor) else number
            node = self.emit(cls.apply, where, x, output=output, constant=not x.requires_grad)
            if any(x is t for t in tensors):
                self.aliases.write(x, node, seen_by_autograd=True)
            else:
                self.aliases.add(x, node)
        return result


@cache
def is_internal(path: str) -> bool:
    """Whether a source file is PyTorch's, or part of the recording."""
    return path.startswith("<") or any(part in path for part in _INTERNAL)


_PROMOTING = {name for name, rule in RULES.items() if rule.partials is not None} | {"aten.cat.default"}
_NOISY = {aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default}
_VIEWS = {"aten.view.default", "aten._unsafe_view.default", "aten._reshape_alias.default"}


def _name(op: Any) -> str:
    if isinstance(op, torch._ops.OpOverload):
        return str(op)
    owner = getattr(op, "__self__", None)  # the class of a custom function
    return f"function.{owner.__name__}.apply" if isinstance(owner, type) else str(op)


def _flat(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _flat(item)
    else:
        yield tree


def _place(x: Tensor, among: Sequence[Tensor]) -> int | None:
    return next((k for k, other in enumerate(among) if other is x), None)


def _promoted(x: Tensor, args: Any) -> torch.dtype:
    """The type that an op which writes to ``x`` computes in."""
    dtype = x.dtype
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_floating_point() and dtype.is_floating_point and arg.ndim:
            dtype = torch.promote_types(dtype, arg.dtype)
    return dtype


def _placed(arg: Any, nodes: dict[int, int]) -> Any:
    if isinstance(arg, Tensor):
        return At(nodes[id(arg)])
    if isinstance(arg, (list, tuple)):
        return type(arg)(_placed(item, nodes) for item in arg)
    return arg


def _mutated(op: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that the op's schema says it writes to."""
    if not op._schema.is_mutable:
        return []
    found = []
    for k, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[k] if k < len(args) else kwargs.get(argument.name)
            found += [x for x in _flat(value) if isinstance(x, Tensor)]
    return found
