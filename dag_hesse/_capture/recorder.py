"""A recording of what a forward dispatched, as nodes without side effects (design §3, capture).

The real forward runs on the real batch; below autograd every op passes here with its tensors. Whether a derivative
passes a tensor that was detached is what autograd says of it (``requires_grad``), so that its own detached copies, of
which derivatives inside a forward are made, are told from the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from dag_hesse._capture.aliases import Aliases
from dag_hesse._capture.arguments import flat, mutated_by, place_of, placed, promoted, shaped_by_values
from dag_hesse._capture.lower import Given, Made, Recipe, recipe
from dag_hesse._capture.refused import in_place_of, not_dense
from dag_hesse._capture.state import Snapshot
from dag_hesse._capture.trail import Trail, name_of
from dag_hesse._capture.views import At, Like, Step, by_place, geometry
from dag_hesse._capture.writes import Pure, Written, drawn, drawn_with_slope, functional, statistics, view_step
from dag_hesse.errors import CaptureError, NonDifferentiableError
from dag_hesse.ir import Guard, Kind, ops

aten = torch.ops.aten
_UNFILLED = {
    "aten.empty.memory_format",
    "aten.empty_strided.default",
    "aten.empty_like.default",
    "aten.new_empty.default",
}


class Recorder(TorchDispatchMode):
    """Records the ops that run while it is entered.

    Args:
        parameters, buffers: the model's, by name.
        before: what was there before; tensors of it that the run writes to are noted there.
    """

    supports_higher_order_operators = True  # PyTorch's own refusal of them shows this object

    def __init__(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], before: Snapshot) -> None:
        super().__init__()
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.trail = Trail(before, {id(b): name for name, b in buffers.items()}, device)
        self.aliases = Aliases(self.trail)
        self.paused, self.anchors, self._tapping = 0, True, ""
        self.running = ""  # the op that runs now
        self.numbers = False  # whether tensors were made of Python's numbers
        for name, p in parameters.items():
            index = self.trail.parameters[name] = self.trail.leaf("param", p, Kind.PARAM, name)
            self.aliases.add(p, index, foreign=True)

    def input(self, x: Tensor, position: int) -> None:
        """``x`` is the batch's tensor at ``position``."""
        index = self.trail.leaf("input", x, Kind.INPUT, f"input{position}")
        self.trail.inputs[index] = position
        self.aliases.add(x, index)

    # --- tensors ----------------------------------------------------------------------------------------------------

    def use(self, x: Tensor) -> int:
        """The node of an argument."""
        if not self.aliases.knows(x):
            self.aliases.add(x, self.trail.constant(x, ""), foreign=True)
        return self.aliases.use(x)

    def _read(self, x: Tensor) -> int:
        """The node of an argument that is not written to. What nobody was seen to fill was filled by C++ (lengths)."""
        node = self.use(x)
        if self.trail.nodes[node].op not in _UNFILLED or not x.numel():
            return node
        with self.pause():
            value = x.detach().clone()
        self.aliases.replace(x, filled := self.trail.constant(value, "filled"))
        return filled

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs inside leaves no nodes."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def tap(self, x: Tensor, name: str) -> Tensor:
        """Tap ``x``: the tensor returned is another one with its value and memory, and a node of its own.

        Where autograd has no use for ``x``, it is given a past that starts here.
        """
        if not torch.is_grad_enabled() or not (x.is_floating_point() or x.is_complex()):
            return x
        self._tapping = name
        try:
            if x.requires_grad or not self.anchors:
                return aten.alias.default(x)
            return x + torch.zeros((), dtype=x.dtype, device=x.device).requires_grad_()
        finally:
            self._tapping = ""

    def _record_tap(self, op: Any, x: Tensor, result: Tensor) -> None:
        name, like = self._tapping, Like(tuple(x.shape), x.dtype)
        self._tapping = ""  # a function transform does more of the same kind to other tensors
        if op is aten.alias.default:
            index = self.aliases.add_view(result, x, Step(ops.tap, (name,), like, like))
        elif op is aten.add.Tensor:
            index = self.trail.emit(ops.tap, (At(self.use(x)), name), like)
            self.aliases.add(result, index)
        else:
            return
        if result.requires_grad or op is aten.add.Tensor:  # derivatives may start at a constant that is tapped
            self.trail.nodes[index].kind = Kind.STRUCTURAL
        self.trail.taps.setdefault(name, []).append(index)

    # --- ops --------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(op, HigherOrderOperator):
            raise CaptureError(in_place_of(op.name(), self.trail.line()))
        tensors = [x for x in flat((args, tuple(kwargs.values()))) if isinstance(x, Tensor)]
        if not self.paused:
            self._check(op, args, tensors)
        updated = statistics(op, args)
        mutated = [] if updated else mutated_by(op, args, kwargs)
        for x in [*mutated, *(updated[:2] if updated else ())]:
            self._save(x)
        if self.paused:
            return op(*args, **kwargs)
        if self._tapping and op in (aten.alias.default, aten.add.Tensor):
            result = op(*args, **kwargs)
            self._record_tap(op, args[0], result)
            return result
        if isinstance(kwargs.get("generator"), torch.Generator):
            self.trail.before.keep_generator(kwargs["generator"])
        if op is aten.lift_fresh.default and not self.aliases.knows(args[0]):  # torch.tensor(numbers)
            self.aliases.add(args[0], self.trail.constant(args[0], "numbers"), foreign=True)
            self.numbers = True
        nodes = {id(x): self.use(x) if any(x is y for y in mutated) else self._read(x) for x in tensors}
        self.running = name_of(op)
        result = op(*args, **kwargs)
        self.running = ""
        self._check_layouts(op, "gives", flat(result))
        if mutated:
            self._write(op, args, kwargs, nodes, mutated, result)
        else:
            self._note(op, args, kwargs, nodes, result)
        if updated:
            self._update(args[0], *updated, nodes)
        return result

    def _check(self, op: Any, args: Any, tensors: Sequence[Tensor]) -> None:
        self._check_layouts(op, "takes", tensors)
        if op is aten.embedding.default and len(args) > 3 and args[3]:
            raise CaptureError(
                f"aten.embedding at {self.trail.line()} divides gradients by frequencies (scale_grad_by_freq=True), "
                "so its 'gradient' is no derivative: leave that option out."
            )
        if drawn_with_slope(op) and op not in _SPLIT and torch.is_grad_enabled() and any(map(_has_slope, tensors)):
            where = f" in module '{self.trail.owner}'" if self.trail.owner else ""
            raise NonDifferentiableError(
                f"{name_of(op)}{where} at {self.trail.line()} draws numbers that have a gradient by its arguments (as "
                "rsample() of Gamma, Chi2 or StudentT does), and no second derivative: draw without a gradient, by "
                ".sample() or from detached arguments, or take a distribution whose rsample() shifts and scales noise, "
                "as Normal or LogNormal."
            )

    def _check_layouts(self, op: Any, does: str, values: Iterable[Any]) -> None:
        for x in values:
            if isinstance(x, Tensor) and (x.layout is not torch.strided or x.is_nested):
                raise CaptureError(f"{name_of(op)} at {self.trail.line()} {does} {not_dense(x)}.")

    def _save(self, x: Tensor) -> None:
        if self.aliases.is_foreign(x):
            self.aliases.storage(x, foreign=True)
            if all(w.tensor is not x for w in self.trail.before.written):
                self.trail.before.written.append(Written.of(x))

    def _note(self, op: Any, args: Any, kwargs: Any, nodes: dict[int, int], result: Any) -> None:
        """Nodes of an op that writes to nothing."""
        found = list(flat(result))
        tensors = [x for x in flat((args, tuple(kwargs.values()))) if isinstance(x, Tensor)]
        places = {x.untyped_storage()._cdata: x for x in reversed(tensors) if x.numel()}
        fresh: list[tuple[int, Tensor]] = []
        for number, x in enumerate(found):
            if not isinstance(x, Tensor):
                self._guard(op, args, nodes, x)
            elif any(x is t for t in tensors):
                continue
            elif x.numel() and (base := places.get(x.untyped_storage()._cdata)) is not None:
                step = view_step(op, args, kwargs, base, x, number)
                apart = op is aten.detach.default
                off = apart or not torch.is_grad_enabled()
                self.aliases.add_view(x, base, step, apart=apart, detached=off)
            else:
                fresh.append((number, x))
        if fresh:
            values = self._values(op, args, kwargs, nodes, fresh, isinstance(result, Tensor))
            for (_, x), node in zip(fresh, values, strict=True):
                self.aliases.add(x, node)
                if shaped_by_values(op, args) and self.trail.nodes[node].shape == x.shape:
                    self.trail.guards.append(Guard(node, x.shape))

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
        if kwargs.get("generator") is not None:  # one's own generator: what it drew is a constant
            return [self.trail.constant(x.detach().clone(), "") for _, x in fresh]
        constant = not torch.is_grad_enabled() or drawn(op)
        plain = constant or not any(self.trail.has_past(k) for k in nodes.values())
        written = None if plain and statistics(op, args) is None else recipe(op, args, kwargs)
        if written is not None:
            made = self._follow(written, args, kwargs, nodes, constant)
            results = [(k, x.dtype) for number, x in fresh if (k := made[number]) is not None]
            if len(results) == len(fresh):
                # Kernels that mix types (a norm of half inputs and float32 weights) give their input's back.
                return [self.trail.cast(At(k), dtype).node for k, dtype in results]
        where = [placed(arg, nodes) for arg in args]
        options = {key: placed(arg, nodes) for key, arg in kwargs.items()}
        return [
            self.trail.emit(op, where, x, kwargs=options, output=None if single else number, constant=constant)
            for number, x in fresh
        ]

    def _dropout(self, args: Any, nodes: dict[int, int], fresh: Sequence[tuple[int, Any]]) -> list[int]:
        """Fused dropout: the mask is drawn by a node of its own, which nothing differentiates."""
        x, constant = nodes[id(args[0])], not torch.is_grad_enabled()
        like, masked = Like(tuple(args[0].shape), args[0].dtype), Like(tuple(args[0].shape), torch.bool)
        mask = self.trail.emit(aten.native_dropout.default, (At(x), *args[1:]), masked, output=1, constant=True)
        factor = self.trail.emit(aten._to_copy.default, (At(mask),), like, kwargs={"dtype": like.dtype}, constant=True)
        kept = self.trail.emit(aten.mul.Tensor, (At(x), At(factor)), like, constant=constant)
        scale = 1 / (1 - args[1]) if args[1] < 1 else 0.0
        found = {0: self.trail.emit(aten.mul.Scalar, (At(kept), scale), like, constant=constant), 1: mask}
        return [found[number] for number, _ in fresh]

    def _noisy(self, op: Any, args: Any, nodes: dict[int, int], mutated: list[Tensor], result: Any) -> list[int]:
        """A ReLU of random slopes: the slopes are drawn by a node of their own, which nothing differentiates."""
        x, noise, constant = At(nodes[id(args[0])]), nodes[id(args[1])], not torch.is_grad_enabled()
        given = list(args[2:5])
        lower, upper, training = given + [0.125, 1 / 3, False][len(given) :]
        if training:
            drawing = [placed(arg, nodes) for arg in args[:5]]
            noise = self.trail.emit(Pure(aten.rrelu_with_noise.default, (1,)), drawing, args[1], constant=True)
            out = self.trail.emit(aten.mul.Tensor, (x, At(noise)), args[0], constant=constant)
        else:
            slope = (lower + upper) / 2
            out = self.trail.emit(aten.leaky_relu.default, (x, slope), args[0], constant=constant)
        if op is aten.rrelu_with_noise.default:
            self.aliases.add(result, out)
        return [noise if y is args[1] else out for y in mutated]

    def _follow(
        self, written: Recipe, args: Any, kwargs: Any, nodes: dict[int, int], constant: bool
    ) -> list[int | None]:
        tensors = [x for x in flat((args, tuple(kwargs.values()))) if isinstance(x, Tensor)]
        made, emit = list[int](), self.trail.emit
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

        for one in written.ops:
            options = {key: at(arg) for key, arg in one.kwargs.items()}
            detached = constant or one.op is aten.detach.default
            made.append(emit(one.op, at(one.args), one.like, kwargs=options, output=one.output, constant=detached))
        found: list[int | None] = []
        for x in written.results:
            place = at(x)
            found.append(
                place.node
                if isinstance(place, At)
                else self.trail.literal(place)
                if isinstance(place, Tensor)
                else None
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
        if op in _NOISY:
            values, result = self._noisy(op, args, nodes, mutated, result), ()
        elif kwargs.get("generator") is not None:
            values = self._values(op, args, kwargs, nodes, list(enumerate(mutated)), True)
        else:
            given, options = pure.arguments(args, kwargs)
            nodes = self._on_one_device(pure.op, given, nodes)
            fresh = [(k, Like(tuple(x.shape), promoted(x, args))) for k, x in enumerate(mutated)]
            values = self._values(pure.op, given, options, nodes, fresh, pure.single)
            values = [self.trail.cast(At(k), x.dtype).node for k, x in zip(values, mutated, strict=True)]
        others = [
            (number, x)
            for number, x in enumerate(flat(result))
            if isinstance(x, Tensor) and place_of(x, mutated) is None
        ]
        if others:
            places = tuple(k for k, arg in enumerate(args) if any(arg is x for x in mutated))
            rest = self._values(Pure(op, places, results=True), args, kwargs, nodes, others, False)
            for (_, x), node in zip(others, rest, strict=True):
                self.aliases.add(x, node)
        for x, value in zip(mutated, values, strict=True):
            if geometry(x) == self.aliases.tensors[x].geometry:
                self.aliases.write(x, value, seen_by_autograd=seen)
            else:
                self.aliases.replace(x, value)

    def _on_one_device(self, op: Any, args: Any, nodes: dict[int, int]) -> dict[int, int]:
        """A copy from another device as one on the spot: lowerings see shapes, and all of them on one device."""
        if op is not aten.copy.default or args[0].device == args[1].device:
            return nodes
        moved = self.trail.emit(
            aten._to_copy.default, (At(nodes[id(args[1])]),), args[1], kwargs={"device": args[0].device}
        )
        return nodes | {id(args[1]): moved}

    def _reshape(self, op: Any, x: Tensor) -> None:
        alias = self.aliases.tensors[x]
        step = by_place(alias.geometry, x, x.dtype)
        if step is None:
            raise CaptureError(f"{name_of(op)} at {self.trail.line()} gives a tensor other memory: not supported.")
        self.aliases.reshaped(x, step)

    def _update(self, x: Tensor, mean: Tensor, var: Tensor, momentum: float, nodes: dict[int, int]) -> None:
        """Running statistics, which batch normalization writes without saying so."""
        dims, at = [0, *range(2, x.ndim)], At(nodes[id(x)])
        like = Like((x.shape[1],), x.dtype)
        new = {
            mean: self.trail.emit(aten.mean.dim, (at, dims), like, constant=True),
            var: self.trail.emit(aten.var.correction, (at, dims), like, kwargs={"correction": 1}, constant=True),
        }
        for old, batch in new.items():
            cast = self.trail.emit(aten._to_copy.default, (At(batch),), old, kwargs={"dtype": old.dtype}, constant=True)
            value = self.trail.emit(aten.lerp.Scalar, (At(nodes[id(old)]), At(cast), momentum), old, constant=True)
            self.aliases.write(old, value, seen_by_autograd=False)

    def _guard(self, op: Any, args: Any, nodes: dict[int, int], value: Any) -> None:
        """Python looked at a value: the recording holds as long as that is the same."""
        if op is aten._local_scalar_dense.default:
            self.trail.guards.append(Guard(nodes[id(args[0])], value))
        elif op is aten.equal.default:
            a, b = (At(nodes[id(x)]) for x in args)
            same = self.trail.emit(aten.eq.Tensor, (a, b), Like(tuple(args[0].shape), torch.bool), constant=True)
            all_same = self.trail.emit(aten.all.default, (At(same),), Like((), torch.bool), constant=True)
            if args[0].shape == args[1].shape:
                self.trail.guards.append(Guard(all_same, value))

    def looked_at(self, x: Tensor) -> None:
        """Python took all values of a tensor: the recording holds as long as they are the same."""
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
        node = self.use(x)
        with self.pause():
            self.trail.guards.append(Guard(node, x.detach().clone()))

    def copies(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A function that gives back what it is given."""
        with self.pause():
            result = run(*args)
        for old, new in zip(args, flat(result), strict=True):
            if isinstance(old, Tensor) and new is not old:
                like = Like(tuple(old.shape), old.dtype)
                self.use(old)
                self.aliases.add_view(new, old, Step(aten.alias.default, (), like, like))
        return result

    def _only_for(self, x: Tensor, node: int) -> None:
        """What follows was written for these integers."""
        self.trail.batch_bound = True
        like = Like(tuple(x.shape), torch.bool)
        seen = self.trail.constant(x.detach().clone(), "literal")
        same = self.trail.emit(aten.eq.Tensor, (At(node), At(seen)), like, constant=True)
        self.trail.guards.append(
            Guard(self.trail.emit(aten.all.default, (At(same),), Like((), torch.bool), constant=True), True)
        )

    def function(
        self, target: Any, args: tuple[Any, ...], run: Callable[[], Any], kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A function with a backward of its own: one node an output, opaque without a rule or lowering of its name."""
        kwargs = kwargs or {}
        tensors = [x for x in flat((args, tuple(kwargs.values()))) if isinstance(x, Tensor)]
        nodes = {id(x): self.use(x) for x in tensors}
        with self.pause():
            result = run()
        outputs = [result] if isinstance(result, Tensor) else list(result)
        active = any(isinstance(x, Tensor) and x.requires_grad for x in outputs)
        written = recipe(target, args, kwargs) if active else None
        made = [] if written is None else self._follow(written, args, kwargs, nodes, constant=False)

        def at(arg: Any) -> Any:
            if isinstance(arg, (list, tuple)):
                return type(arg)(map(at, arg))
            return At(nodes[id(arg)]) if isinstance(arg, Tensor) else arg

        where, options = tuple(map(at, args)), {key: at(arg) for key, arg in kwargs.items()}
        for number, x in enumerate(outputs):
            if not isinstance(x, Tensor):
                continue
            output = None if isinstance(result, Tensor) else number
            node = made[number] if made else None
            if node is None:
                node = self.trail.emit(target, where, x, kwargs=options, output=output, constant=not x.requires_grad)
            if any(x is t for t in tensors):
                self.aliases.write(x, node, seen_by_autograd=True)
            else:
                self.aliases.add(x, node)
        return result


def _has_slope(x: Tensor) -> bool:
    return x.is_floating_point() and x.requires_grad


_NOISY = {aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default}
_SPLIT = {*_NOISY, aten.native_dropout.default}  # draws that become a node of their own beside what is differentiated
