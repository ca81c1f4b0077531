"""Sample numbers moved through the ops that pick and write by index, all on the CPU; and ops tried on random values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dag_hesse._capture.batch_axis import FREE, along, found, spread
from dag_hesse.ir import BatchAxis, CurvatureGraph, Kind, Node
from dag_hesse.ir.node import execute
from dag_hesse.randomness import preserved
from dag_hesse.rules.structural import axes

if TYPE_CHECKING:
    from dag_hesse._capture.interaction import Walker

_RANDOM = re.compile(r"rand|bernoulli|multinomial|dropout|_\.")
_MOST_TRIED = 1 << 22  # elements of an op that is tried
_ACCUMULATING = ("scatter_add", "scatter_reduce", "index_add")


def span(start: Any, end: Any, step: int) -> slice:
    """A slice from the arguments of an ATen op, whose open end is a very large number."""
    return slice(start, end, step)


class Constants:
    """Values, on the CPU, of tensors that depend on nothing but the batch."""

    def __init__(self, graph: CurvatureGraph, tensors: Sequence[Tensor]) -> None:
        self.graph, self.tensors = graph, tensors
        self.values: dict[int, Tensor | None] = {}

    def value(self, k: int) -> Tensor | None:
        """The value of node ``k``; None if it depends on parameters, or on chance."""
        wanted, stack = set[int](), [k]
        while stack:
            if (j := stack.pop()) in self.values or j in wanted:
                continue
            wanted.add(j)
            stack += self.graph.nodes[j].inputs
        for j in sorted(wanted):
            self.values[j] = self._evaluate(self.graph.nodes[j])
        return self.values[k]

    def _evaluate(self, node: Node) -> Tensor | None:
        if node.kind is Kind.INPUT:
            return self.tensors[self.graph.inputs[node.index]].detach().cpu()
        if node.target is None:
            held = self.graph.constants.get(node.index)
            return None if held is None else held.detach().cpu()
        values = [self.values[k] for k in node.inputs]
        if node.kind is not Kind.CONST or _RANDOM.search(node.op) or any(v is None for v in values):
            return None
        with torch.no_grad():
            return execute(node, [v for v in values if v is not None]).cpu()


def aligned(walk: Walker, node: Node) -> BatchAxis | None:
    """The batch axis of all inputs of a gather or scatter along another one, where they agree."""
    if node.op.split(".")[1] not in ("gather", "scatter", "scatter_add", "scatter_reduce", "take_along_dim"):
        return None
    dim, states = axes(node.args[1], len(node.shape))[0], [walk.states[k] for k in node.inputs]
    batch_axes = {s.batch_axis for s in states if s.batch_axis is not None}
    if len(batch_axes) != 1 or any(s.lost or s.one >= 0 for s in states):
        return None
    batch_axis = batch_axes.pop()
    axis, shapes = batch_axis.axis, [walk.shape(k) for k in node.inputs]
    whole = all(len(shape) > axis and shape[axis] == batch_axis.size for shape in shapes)
    return batch_axis if whole and axis != dim and node.shape[axis] == batch_axis.size else None


def moved(walk: Walker, node: Node) -> BatchAxis | None:
    """Where the samples lie behind an op that picks or writes by index; None if nobody can tell."""
    if any(walk.states[k].lost and not walk.constant(k) for k in node.inputs):
        return None
    name = node.op.split(".")[1]
    if name in ("index", "_unsafe_index"):
        return _picked(walk, node)
    if name in ("index_put", "_unsafe_index_put"):
        return _put(walk, node)
    if name == "index_select":
        return _selected(walk, node)
    if name in ("gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy"):
        return _along(walk, node, name)
    if name in ("take", "index_fill"):
        return None
    out = execute(node, [_labels(walk, k).contiguous() for k in node.inputs])
    return found(out)


def _labels(walk: Walker, k: int) -> Tensor:
    state, shape = walk.states[k], walk.shape(k)
    return torch.full((), state.one, device="cpu").expand(shape) if state.one >= 0 else spread(state.batch_axis, shape)


def _agree(first: Tensor, *others: Tensor) -> Tensor | None:
    """Sample numbers that all know, or do not contradict; None where two differ."""
    for other in others:
        if bool(((first != other) & (first != FREE) & (other != FREE)).any()):
            return None
        first = torch.maximum(first, other)
    return first


def _found(labels: Tensor | None) -> BatchAxis | None:
    return None if labels is None else found(labels)


def _indices(walk: Walker, node: Node, batch_axis: int) -> list[tuple[Tensor, Tensor] | None] | None:
    """Per axis, the index's value and its sample numbers. Values that nobody knows are no matter off the batch axis."""
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for axis, ref in enumerate(node.args[1]):
        if ref is None:
            pairs.append(None)
            continue
        k = node.inputs[ref.slot]
        value = walk.constants.value(k)
        if value is None and axis != batch_axis:
            value = torch.zeros(walk.shape(k), dtype=torch.int64, device="cpu")
        if value is None or value.dtype == torch.bool:
            return None
        pairs.append((value, _labels(walk, k)))
    return pairs


def _narrowed(labels: Tensor, batch_axis: BatchAxis | None, indexed: Callable[[int], bool]) -> Tensor:
    """One element along every axis that is neither indexed nor the batch's: they would all say the same."""
    for axis in range(labels.ndim):
        if not indexed(axis) and (batch_axis is None or batch_axis.axis != axis):
            labels = labels.narrow(axis, 0, 1)
    return labels


def _picked(walk: Walker, node: Node) -> BatchAxis | None:
    k = node.inputs[0]
    batch_axis, one = walk.states[k].batch_axis, walk.states[k].one
    pairs = _indices(walk, node, -1 if batch_axis is None else batch_axis.axis)
    if pairs is None:
        return None
    there = [axis for axis, pair in enumerate(pairs) if pair is not None]
    base = _narrowed(_labels(walk, k), batch_axis, lambda axis: axis in there)
    picked = base[tuple(slice(None) if pair is None else pair[0] for pair in pairs)]
    own = torch.broadcast_tensors(*(pair[1] for pair in pairs if pair is not None))
    first = there[0] if there == list(range(there[0], there[-1] + 1)) else 0
    shape = [1] * first + list(own[0].shape) + [1] * (picked.ndim - first - own[0].ndim)
    labels = _agree(picked, *(index.reshape(shape) for index in own))
    return None if labels is None or one >= 0 else _found(labels)


def _put(walk: Walker, node: Node) -> BatchAxis | None:
    into, value = node.inputs[0], node.inputs[node.args[2].slot]
    batch_axis = walk.states[into].batch_axis
    pairs = _indices(walk, node, -2 if batch_axis is None else batch_axis.axis)
    if pairs is None or (
        batch_axis is None and any(walk.constants.value(node.inputs[r.slot]) is None for r in node.args[1] if r)
    ):
        return None
    where = tuple(slice(None) if pair is None else pair[0] for pair in pairs)
    labels, written = _labels(walk, into).clone(), _labels(walk, value)
    adds = bool(node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False))
    before = labels[where]
    written = written.expand(before.shape)
    own = [pair[1] for pair in pairs if pair is not None]
    new = _agree(written, *([before] if adds else []))
    if new is None or any(bool((index != FREE).any()) for index in own if bool((before == FREE).all())):
        return None
    labels[where] = new
    return found(labels) if torch.equal(labels[where], new) else None  # read back: written by one sample only


def _selected(walk: Walker, node: Node) -> BatchAxis | None:
    k, batch_axis = node.inputs[0], walk.states[node.inputs[0]].batch_axis
    dim, index = axes(node.args[1], len(walk.shape(k)))[0], node.inputs[1]
    own = walk.states[index].batch_axis
    if batch_axis is None or batch_axis.axis != dim:
        return batch_axis if own is None else own.at(dim) if batch_axis is None else None
    value = walk.constants.value(index)
    return None if value is None else along(batch_axis.line()[value.reshape(-1)], dim)


def _along(walk: Walker, node: Node, name: str) -> BatchAxis | None:
    """gather, scatter and index_add along the batch axis, by the index's value."""
    dim, ndim = axes(node.args[1], len(node.shape))[0], len(node.shape)
    at = node.inputs[node.args[2].slot]
    value = walk.constants.value(at)
    if value is None:
        return None
    base, own = _labels(walk, node.inputs[0]), _labels(walk, at)
    if name in ("index_add", "index_copy"):
        shape = list(node.shape)
        shape[dim] = value.numel()
        lined = [-1 if k == dim else 1 for k in range(ndim)]
        value, own = value.reshape(lined).expand(shape), own.reshape(lined).expand(shape)
    picked = base.gather(dim, value)
    if name in ("gather", "take_along_dim"):
        return _found(_agree(picked, own))
    written = own
    if hasattr(node.args[3], "slot"):
        full = _labels(walk, node.inputs[node.args[3].slot])
        cut = _agree(full[tuple(slice(0, n) for n in value.shape)], own)
        if cut is None:
            return None
        written = cut
    if name in _ACCUMULATING or "reduce" in node.kwargs:
        joined = _agree(written, picked)
        if joined is None:
            return None
        written = joined
    labels = base.clone().scatter(dim, value, written)
    return found(labels) if torch.equal(labels.gather(dim, value), written) else None


def tried(walk: Walker, node: Node) -> BatchAxis | None:
    """The axis whose slices alone change when their sample does, by running an op without a rule on random values."""
    graph, batch_axes = walk.graph, [walk.states[k].batch_axis for k in node.inputs]
    known = all(s.batch_axis is not None or s.free for s in (walk.states[k] for k in node.inputs))
    whole = all(p is None or (p.batch == walk.size and p.start == 0) for p in batch_axes)
    elements = node.numel + sum(graph.nodes[k].numel for k in node.inputs)
    drawn = all(_is_drawn(graph.nodes[k].dtype) or p is None for k, p in zip(node.inputs, batch_axes, strict=True))
    if not (known and whole and drawn) or elements > _MOST_TRIED or _RANDOM.search(node.op):
        return None
    for positive in (False, True):
        try:
            with preserved(), torch.no_grad():
                return _responding(walk, node, batch_axes, positive)
        except (RuntimeError, IndexError, ValueError, NotImplementedError):
            continue  # random values are not in its domain
    return None


def _responding(walk: Walker, node: Node, batch_axes: Sequence[BatchAxis | None], positive: bool) -> BatchAxis | None:
    generator = torch.Generator().manual_seed(0)
    values = [_drawn(walk, k, generator, positive) for k in node.inputs]
    if any(v is None for v in values):
        return None
    base = [v for v in values if v is not None]
    first, changes = execute(node, base), dict[int, Tensor]()
    for b in sorted({0, walk.size // 2, walk.size - 1}):
        hit = torch.zeros(first.shape, dtype=torch.bool, device="cpu")
        for _ in range(2):
            other = [_redrawn(v, p, b, generator, positive) for v, p in zip(base, batch_axes, strict=True)]
            now = execute(node, other)
            hit |= (now != first) & ~(now.isnan() & first.isnan())
        changes[b] = hit
    return next((p for p in _candidates(first, walk.size) if _explains(p, changes)), None)


def _drawn(walk: Walker, k: int, generator: torch.Generator, positive: bool) -> Tensor | None:
    node = walk.graph.nodes[k]
    if _is_drawn(node.dtype):
        return _random(node.shape, node.dtype, generator, positive)
    return walk.constants.value(k)


def _is_drawn(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, positive: bool) -> Tensor:
    """Normal numbers; or positive definite matrices, for ops that take nothing else."""
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    if positive and x.ndim > 1 and x.shape[-1] == x.shape[-2]:
        x = x @ x.mT + x.shape[-1] * torch.eye(x.shape[-1], dtype=x.dtype, device="cpu")
    return (x.abs() + 0.1 if positive and x.ndim < 2 else x).to(dtype)


def _redrawn(x: Tensor, batch_axis: BatchAxis | None, b: int, generator: torch.Generator, positive: bool) -> Tensor:
    if batch_axis is None:
        return x
    mine = spread(batch_axis, x.shape) == b
    return torch.where(mine, _random(x.shape, x.dtype, generator, positive), x)


def _candidates(out: Tensor, batch: int) -> Iterator[BatchAxis]:
    for axis, size in enumerate(out.shape):
        if size % batch == 0:
            for inner in (k for k in range(1, size // batch + 1) if (size // batch) % k == 0):
                yield BatchAxis(axis, size // (batch * inner), batch, inner)


def _explains(batch_axis: BatchAxis, changes: dict[int, Tensor]) -> bool:
    """Whether every sample changed something, and nothing outside its own slice."""
    return all(
        bool(hit.any()) and not bool((hit & (spread(batch_axis, hit.shape) != b)).any()) for b, hit in changes.items()
    )
