"""What ops that compute element by element, or only move elements, do to the batch axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dag_hesse._capture import labels
from dag_hesse._capture.batch_axis import FREE, along, reshaped
from dag_hesse._capture.dependence import (
    LOST,
    Follow,
    State,
    is_linear,
    mixed,
    option,
    separate,
)
from dag_hesse.ir import BatchAxis, Interaction, Node
from dag_hesse.rules.structural import axes

if TYPE_CHECKING:
    from dag_hesse._capture.interaction import Walker


def elementwise(walk: Walker, node: Node) -> State:
    """Aligned from the right; what depends on single samples may be added, and no more."""
    batch_axes: list[BatchAxis] = []
    for k in node.inputs:
        if (batch_axis := walk.states[k].batch_axis) is not None:
            batch_axes.append(batch_axis.at(batch_axis.axis + len(node.shape) - len(walk.shape(k))))
    if any(walk.states[k].one >= 0 for k in node.inputs) and walk.size > 1:
        return mixed(batch_axes[0]) if batch_axes else State(Interaction.SUMMED) if is_linear(node) else mixed(None)
    fits = all(0 <= p.axis < len(node.shape) and node.shape[p.axis] == p.size for p in batch_axes)
    if not fits or any(batch_axis != batch_axes[0] for batch_axis in batch_axes):
        return mixed(batch_axes[0]) if fits else LOST
    return separate(batch_axes[0])


def only(walk: Walker, node: Node) -> BatchAxis | None:
    """The batch axis of the first input."""
    return walk.states[node.inputs[0]].batch_axis


def reshape(walk: Walker, node: Node) -> State:
    batch_axis = only(walk, node)
    return separate(batch_axis and reshaped(batch_axis, walk.shape(node.inputs[0]), node.shape))


def permute(walk: Walker, node: Node) -> State:
    return _permuted(walk, node, axes(option(node, "dims"), len(node.shape)))


def transpose(walk: Walker, node: Node) -> State:
    ndim = len(node.shape)
    order = list(range(ndim))
    if ndim > 1:
        one, other = axes([option(node, "dim0", 0), option(node, "dim1", 1)], ndim)
        order[one], order[other] = other, one
    return _permuted(walk, node, order)


def _permuted(walk: Walker, node: Node, order: list[int]) -> State:
    batch_axis = only(walk, node)
    return separate(batch_axis and batch_axis.at(order.index(batch_axis.axis)))


def expand(walk: Walker, node: Node) -> State:
    batch_axis, more = only(walk, node), len(node.shape) - len(walk.shape(node.inputs[0]))
    if batch_axis is not None and node.shape[batch_axis.axis + more] != batch_axis.size:
        batch_axis = replace(batch_axis, outer=node.shape[batch_axis.axis + more])  # a batch of one
    return separate(batch_axis and batch_axis.at(batch_axis.axis + more))


Line = Callable[[Node, torch.Tensor, int, int], torch.Tensor | None]


def along_axis(change: Line) -> Follow:
    """Ops that pick along axes: ``change(node, line of the batch axis, that axis, ndim)``; None where it is lost."""

    def follow(walk: Walker, node: Node) -> State:
        k = node.inputs[0]
        batch_axis, ndim = walk.states[k].batch_axis, len(walk.shape(k))
        if batch_axis is None:
            return LOST
        line = change(node, batch_axis.line(), batch_axis.axis, ndim)
        return LOST if line is None else of_line(line, batch_axis.axis + len(node.shape) - ndim)

    return follow


def _dim(node: Node, ndim: int) -> int:
    return axes(option(node, "dim", option(node, "dimension", 0)), ndim)[0]


def _slice(node: Node, line: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    window = labels.span(option(node, "start"), option(node, "end"), option(node, "step", 1))
    return line[window] if _dim(node, ndim) == axis else line


def _flip(node: Node, line: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    return line.flip(0) if axis in axes(option(node, "dims"), ndim) else line


def _roll(node: Node, line: torch.Tensor, axis: int, ndim: int) -> torch.Tensor | None:
    dims, shifts = option(node, "dims", []), option(node, "shifts")
    if not dims:
        return None
    return line.roll(sum(s for s, d in zip(shifts, axes(dims, ndim), strict=True) if d == axis))


def _pad(node: Node, line: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    pads, after = option(node, "pad"), 2 * (ndim - 1 - axis)
    return torch.constant_pad_nd(line, pads[after : after + 2], FREE) if after < len(pads) else line


def _repeat(node: Node, line: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    repeats = option(node, "repeats")
    return line.repeat(repeats[axis + len(repeats) - ndim])


def unfold(walk: Walker, node: Node) -> State:
    """Windows along an axis; their elements lie along a new one, the last."""
    batch_axis = only(walk, node)
    if batch_axis is None or _dim(node, len(walk.shape(node.inputs[0]))) == batch_axis.axis:
        return LOST
    return of_line(batch_axis.line(), batch_axis.axis)


def select(walk: Walker, node: Node) -> State:
    batch_axis, ndim = only(walk, node), len(walk.shape(node.inputs[0]))
    if batch_axis is None:
        return LOST
    dim = _dim(node, ndim)
    if dim == batch_axis.axis:
        return State(Interaction.SEPARATE, one=int(batch_axis.line()[option(node, "index")]))
    return of_line(batch_axis.line(), batch_axis.axis - (dim < batch_axis.axis))


def of_line(line: torch.Tensor, axis: int) -> State:
    batch_axis = along(line, axis)
    if batch_axis is not None and batch_axis.batch == 1:
        return State(Interaction.SEPARATE, batch_axis if batch_axis.start == 0 else None, one=batch_axis.start)
    return separate(batch_axis)


def cat(walk: Walker, node: Node) -> State:
    inputs = [node.inputs[ref.slot] for ref in node.args[0]]
    inputs = [k for k in inputs if len(walk.shape(k)) == len(node.shape)]  # an old cat() takes empty vectors
    return _joined(node, [walk.states[k].batch_axis for k in inputs], lambda dim: [walk.line(k, dim) for k in inputs])


def stack(walk: Walker, node: Node) -> State:
    dim = axes(option(node, "dim", 0), len(node.shape))[0]
    states = [walk.states[node.inputs[ref.slot]] for ref in node.args[0]]
    moved = [_unsqueezed(s.batch_axis, dim) for s in states]
    return _joined(node, moved, lambda dim: [torch.tensor([s.one], device="cpu") for s in states])


def _joined(node: Node, batch_axes: Sequence[BatchAxis | None], pieces: Callable[[int], list[torch.Tensor]]) -> State:
    """Tensors side by side along the op's ``dim``: where the samples lie along that, ``pieces`` of their line."""
    dim = axes(option(node, "dim", 0), len(node.shape))[0]
    known = {p for p in batch_axes if p is not None}
    if known and all(p.axis != dim for p in known):
        return separate(known.pop()) if len(known) == 1 else LOST
    return of_line(torch.cat(pieces(dim)), dim)


def _unsqueezed(batch_axis: BatchAxis | None, dim: int) -> BatchAxis | None:
    return batch_axis and batch_axis.at(batch_axis.axis + (batch_axis.axis >= dim))


def slice_write(walk: Walker, node: Node) -> State:
    window = labels.span(option(node, "start"), option(node, "end"), option(node, "step", 1))
    value = node.inputs[1]
    return written(walk, node, window, walk.states[value].batch_axis, lambda dim: walk.line(value, dim))


def select_write(walk: Walker, node: Node) -> State:
    dim, index = axes(option(node, "dim", 0), len(node.shape))[0], option(node, "index")
    value = walk.states[node.inputs[1]]
    window = labels.span(index, index % node.shape[dim] + 1, 1)
    one = torch.tensor([value.one], device="cpu")
    return written(walk, node, window, _unsqueezed(value.batch_axis, dim), lambda dim: one)


def written(
    walk: Walker, node: Node, window: slice, b: BatchAxis | None, piece: Callable[[int], torch.Tensor]
) -> State:
    """A tensor with a ``window`` of its ``dim`` overwritten by one whose samples lie at ``b``."""
    into, value = node.inputs[:2]
    dim, a = axes(option(node, "dim", 0), len(node.shape))[0], walk.states[into].batch_axis
    if all(p is None or p.axis != dim for p in (a, b)) and walk.states[value].one < 0:
        return separate(a or b) if a is None or b is None or a == b else mixed(a)
    if any(p is not None and p.axis != dim for p in (a, b)):
        return mixed(a)
    line = walk.line(into, dim).clone()
    line[window] = piece(dim)
    return of_line(line, dim)


# Ops along one axis, by what they do to a line of the samples' numbers.
pad, repeat, roll, flip, narrow = map(along_axis, (_pad, _repeat, _roll, _flip, _slice))
