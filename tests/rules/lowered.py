"""An op as its lowering writes it, differentiated twice by the rules alone; and what to compare that with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dag_hesse._capture.lower import Given, Made, recipe
from dag_hesse.ir import Kind, Node, Ref
from dag_hesse.ir.node import execute
from dag_hesse.rules import RULES, Call, Linearized, rule_for
from dag_hesse.rules.base import ALL


class Written:
    """``op(*args, **kwargs)`` in ops that have rules, linearized at the arguments' values.

    Args:
        active: which of the tensor arguments are differentiated; None: all floating-point ones.
        output: the op's result that is meant.
    """

    def __init__(
        self,
        op: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        active: Sequence[int] | None = None,
        output: int = 0,
    ) -> None:
        leaves = pytree.tree_flatten((tuple(args), dict(kwargs or {})))[0]
        self.values: list[Tensor] = [x for x in leaves if isinstance(x, Tensor)]
        floating = [k for k, x in enumerate(self.values) if x.is_floating_point()]
        self.active = list(floating if active is None else active)
        self.on = [k in self.active for k in range(len(self.values))]
        self.nodes: list[tuple[int, Node]] = []
        self.lin: dict[int, Linearized] = {}
        found = recipe(op, args, dict(kwargs or {}))
        assert found is not None, f"{op} stays as it is"
        self.places: list[int] = []
        for one in found.ops:
            self.places.append(self._add(one))
        self.root = self._place(found.results[output])

    def _place(self, x: Any) -> int:
        if isinstance(x, Given):
            return x.number
        if isinstance(x, Made):
            return self.places[x.number]
        self.values.append(x)  # a constant of the lowering's own
        self.on.append(False)
        return len(self.values) - 1

    def _add(self, one: Any) -> int:
        inputs: list[int] = []

        def place(arg: Any) -> Any:
            if isinstance(arg, (Given, Made, Tensor)):
                inputs.append(self._place(arg))
                return Ref(len(inputs) - 1)
            if isinstance(arg, (list, tuple)):
                return [place(x) for x in arg]
            return arg

        args, kwargs = tuple(place(x) for x in one.args), {k: place(x) for k, x in one.kwargs.items()}
        values, op = tuple(self.values[k] for k in inputs), str(one.op)
        on = tuple(self.on[k] and values[slot].is_floating_point() for slot, k in enumerate(inputs))
        kind = RULES[op].kind if op in RULES else Kind.OPAQUE
        node = Node(0, op, one.op, args, kwargs, tuple(inputs), one.like.shape, one.like.dtype, kind, one.output)
        with torch.no_grad():
            out = execute(node, values)
        assert tuple(out.shape) == tuple(one.like.shape), f"{op} gives {tuple(out.shape)}, was {one.like.shape}"
        if not (any(on) and out.is_floating_point() and self._differentiable(node, values, on)):
            node.kind = Kind.CONST
        self.values.append(out)
        self.on.append(node.is_differentiable)
        place_of = len(self.values) - 1
        if node.is_differentiable:
            assert kind is not Kind.OPAQUE, f"{op} has no rule"
            self.lin[place_of] = rule_for(node).linearize(Call(node, values, out, on))
            self.nodes.append((place_of, node))
        return place_of

    @staticmethod
    def _differentiable(node: Node, values: Sequence[Tensor], on: Sequence[bool]) -> bool:
        if node.op in RULES:
            return True
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() if k else v for v, k in zip(values, on, strict=True)]
            return execute(node, leaves).requires_grad

    @property
    def value(self) -> Tensor:
        return self.values[self.root]

    def _slots(self, node: Node) -> list[int]:
        return [s for s, k in enumerate(node.inputs) if self.on[k] and self.values[k].is_floating_point()]

    def derivatives(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian of ⟨λ, op⟩ in the active arguments, flattened one after another."""
        sizes = [self.values[k].numel() for k in self.active]
        columns = torch.eye(sum(sizes), dtype=lam.dtype).split(sizes, 1)
        tangents = {k: c.reshape(-1, *self.values[k].shape) for k, c in zip(self.active, columns, strict=True)}
        adjoints = {self.root: lam.unsqueeze(0)}
        for place, node in reversed(self.nodes):
            mine, slots = adjoints.get(place), self._slots(node)
            self._pass(node, self.lin[place].bind(mine, () if mine is None else slots, {}), adjoints)
        residuals: dict[int, Any] = {}
        for place, node in self.nodes:
            given = {s: tangents[node.inputs[s]] for s in self._slots(node)}
            moved, residuals[place] = self.lin[place].push(given, True, self._slots(node))
            assert moved is not None
            tangents[place] = moved
        second: dict[int, Tensor] = {}
        for place, node in reversed(self.nodes):
            if place in second or residuals[place] is not None:
                found = self.lin[place].pull(second.get(place), residuals[place], ALL, self._slots(node), {})
                self._pass(node, found, second)
        return self._flat(adjoints, 1)[0], self._flat(second, sum(sizes))

    def _pass(self, node: Node, found: Mapping[int, Tensor], into: dict[int, Tensor]) -> None:
        for slot, x in found.items():
            k = node.inputs[slot]
            into[k] = into[k] + x if k in into else x

    def _flat(self, found: Mapping[int, Tensor], rows: int) -> Tensor:
        zero = torch.zeros(rows, 1, dtype=self.value.dtype)
        parts = [
            found[k].reshape(rows, -1) if k in found else zero.expand(rows, self.values[k].numel()) for k in self.active
        ]
        return torch.cat(parts, 1)


Function = Callable[[Sequence[Tensor]], Tensor]


def of_op(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, output: int = 0) -> Function:
    """The op as a function of its tensor arguments."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))

    def run(tensors: Sequence[Tensor]) -> Tensor:
        given = iter(tensors)
        a, kw = pytree.tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)
        found = op(*a, **kw)
        return found if isinstance(found, Tensor) else found[output]

    return run


def gradient(run: Function, values: Sequence[Tensor], active: Sequence[int], lam: Tensor, tape: bool = False) -> Tensor:
    """Of ⟨λ, run⟩, flattened."""
    leaves = {k: values[k] if values[k].requires_grad else values[k].detach().requires_grad_() for k in active}
    with torch.enable_grad():
        out = run([leaves.get(k, v) for k, v in enumerate(values)])
        if not out.requires_grad:
            return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves.values()])
        found = torch.autograd.grad(out, list(leaves.values()), lam, create_graph=tape, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in found])


def by_double_backward(run: Function, values: Sequence[Tensor], active: Sequence[int], lam: Tensor) -> Tensor:
    """The Hessian of ⟨λ, run⟩ as autograd has it."""
    leaves = [v.detach().requires_grad_() if k in active else v for k, v in enumerate(values)]
    of = [leaves[k] for k in active]
    with torch.enable_grad():
        # what an op saves as its own output must not be a leaf
        slope = gradient(lambda xs: run([x + 0 if x.requires_grad else x for x in xs]), leaves, active, lam, tape=True)
        rows = [
            torch.autograd.grad(s, of, retain_graph=True, materialize_grads=True)
            if s.requires_grad
            else [torch.zeros_like(x) for x in of]
            for s in slope
        ]
    return torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows])


def by_differences(
    run: Function, values: Sequence[Tensor], active: Sequence[int], lam: Tensor, step: float = 1e-5
) -> Tensor:
    """The Hessian of ⟨λ, run⟩ as central differences of autograd's gradient."""
    rows = []
    for k in active:
        for j in range(values[k].numel()):
            ends = []
            for sign in (1, -1):
                moved = [v.clone() for v in values]
                moved[k].view(-1)[j] += sign * step
                ends.append(gradient(run, moved, active, lam))
            rows.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(rows)
