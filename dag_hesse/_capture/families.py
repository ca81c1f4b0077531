"""What each family of ops does to the batch axis: a rule takes a node and says how it depends on samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dag_hesse._capture import labels
from dag_hesse._capture.dependence import (
    GONE,
    LOST,
    NONE,
    Follow,
    State,
    is_elementwise,
    mixed,
    option,
    separate,
)
from dag_hesse._capture.layouts import (
    cat,
    elementwise,
    expand,
    flip,
    narrow,
    of_line,
    only,
    pad,
    permute,
    repeat,
    reshape,
    roll,
    select,
    select_write,
    slice_write,
    stack,
    transpose,
    unfold,
)
from dag_hesse.ir import BatchAxis, Interaction, Node
from dag_hesse.rules.base import Samples
from dag_hesse.rules.structural import axes
from dag_hesse.rules.table import RULES

if TYPE_CHECKING:
    from dag_hesse._capture.interaction import Walker


def reduction(walk: Walker, node: Node) -> State:
    return _reduced(walk, node, GONE)


def linear_reduction(walk: Walker, node: Node) -> State:
    return _reduced(walk, node, State(Interaction.SUMMED))


def _reduced(walk: Walker, node: Node, over_samples: State) -> State:
    k = node.inputs[0]
    state, ndim = walk.states[k], len(walk.shape(k))
    dims = axes(option(node, "dim"), ndim)
    if state.batch_axis is None or state.batch_axis.axis in dims:
        return over_samples
    shift = 0 if len(node.shape) == ndim else sum(d < state.batch_axis.axis for d in dims)
    return separate(state.batch_axis.at(state.batch_axis.axis - shift))


def sequence(walk: Walker, node: Node) -> State:
    """Ops that mix elements along some axes and keep the others."""
    k = node.inputs[0]
    batch_axis, ndim = walk.states[k].batch_axis, len(walk.shape(k))
    if batch_axis is None:
        return GONE
    dims = axes(option(node, "dims", option(node, "dim", -1)), ndim)
    same = len(node.shape) == ndim
    if batch_axis.axis in dims:
        return mixed(batch_axis) if same and node.shape[batch_axis.axis] == batch_axis.size else GONE
    return separate(batch_axis.at(batch_axis.axis - (0 if same else sum(d < batch_axis.axis for d in dims))))


def product(walk: Walker, node: Node) -> State:
    """mm, bmm and their kin: a stack of products where all have it, rows, columns, and what is summed over."""
    a, b = (walk.states[k].batch_axis for k in node.inputs[:2])
    last = len(node.shape) - 1  # rows of a at last - 1, columns of b at last
    summed = (a is None or a.axis == last) and (b is None or b.axis == last - 1)
    if summed and (a is None or b is None or a.at(0) == b.at(0)):
        return State(Interaction.SUMMED)  # Σ over samples of a term each
    if a and b:
        if last == 2 and a == b and a.axis == 0:
            return separate(a)
        return mixed(a if a.axis < last else b if b.axis != last - 1 else None)
    batch_axis = a or b
    return elementwise(walk, node) if batch_axis is None else separate(batch_axis)


def convolution(walk: Walker, node: Node) -> State:
    x, w = (walk.states[k] for k in node.inputs[:2])
    if any(not walk.states[k].free for k in node.inputs[2:]) or x.batch_axis is None:
        return LOST
    if x.batch_axis.axis == 0:
        return separate(x.batch_axis) if w.free else mixed(x.batch_axis)
    return _grouped(walk, node, x.batch_axis, w.batch_axis) if x.batch_axis.axis == 1 else LOST


def _grouped(walk: Walker, node: Node, x: BatchAxis, w: BatchAxis | None) -> State:
    """A batch that is folded into the image channels, every group of them being of one sample."""
    groups, transposed = option(node, "groups"), option(node, "transposed")
    into, out = walk.shape(node.inputs[0])[1] // groups, node.shape[1] // groups
    if x.inner % into or transposed:
        return mixed(x) if node.shape[1] == x.size else LOST
    batch_axis = replace(x, inner=x.inner // into * out)
    return separate(batch_axis) if w is None or w.at(1) == batch_axis else mixed(batch_axis)


def leading(walk: Walker, node: Node) -> State:
    """Ops that do the same to every slice of their first axis."""
    states = [walk.states[k] for k in node.inputs]
    batch_axes = {s.batch_axis for s in states if s.batch_axis is not None}
    batch_axis = batch_axes.pop() if len(batch_axes) == 1 else None
    return separate(batch_axis if batch_axis and batch_axis.axis == 0 and node.shape[0] == batch_axis.size else None)


def spatial(walk: Walker, node: Node) -> State:
    """Ops over trailing axes, whose number is in their name."""
    digits = [int(c) for c in "123" if f"{c}d" in node.op]
    batch_axis, ndim = only(walk, node), len(walk.shape(node.inputs[0]))
    if batch_axis is None or batch_axis.axis >= ndim - (digits[0] if digits else 2) or len(node.shape) != ndim:
        return LOST
    return separate(batch_axis)


def affine(walk: Walker, node: Node) -> State:
    """BatchNorm with given statistics: they lie along axis 1."""
    x = only(walk, node)
    others = [p.at(1) for k in node.inputs[1:] if (p := walk.states[k].batch_axis) is not None]
    if x is None:
        return LOST
    return separate(x) if all(p == x for p in others) else mixed(x)


def rows(walk: Walker, node: Node) -> State:
    table, index = (walk.states[k] for k in node.inputs[:2])
    return separate(index.batch_axis) if table.free else LOST


def bags(walk: Walker, node: Node) -> State:
    """EmbeddingBag: a bag per offset. Offsets that count off the samples' rows put one bag after the other."""
    table, index, offsets = (walk.states[k] for k in node.inputs[:3])
    if not table.free or node.output not in (None, 0):
        return LOST
    if offsets.batch_axis is not None:
        return separate(offsets.batch_axis)
    starts, batch_axis = walk.constants.value(node.inputs[2]), index.batch_axis
    if starts is None or batch_axis is None:
        return LOST
    ends = torch.cat([starts[1:], torch.tensor([batch_axis.size], device="cpu")])[: node.shape[0]]
    line = batch_axis.line()
    bag = [line[s:e] for s, e in zip(starts.tolist(), ends.tolist(), strict=False)]
    whole = all(len(b) and bool((b == b[0]).all()) for b in bag)
    return of_line(torch.stack([b[0] for b in bag]), 0) if whole else LOST


def _masked(walk: Walker, node: Node) -> BatchAxis | None:
    """One value written where a mask of the tensor's own samples says so."""
    if node.op.split(".")[1] != "index_put" or len(node.inputs) != 3 or len(node.args[1]) != 1:
        return None
    (x, mask, value), states = node.inputs, [walk.states[k] for k in node.inputs]
    batch_axes = {s.batch_axis for s in states[:2] if s.batch_axis is not None}
    known = all(s.batch_axis is not None or s.free for s in states[:2]) and len(batch_axes) == 1
    one = walk.graph.nodes[value].numel == 1 and states[2].free
    if walk.graph.nodes[mask].dtype is torch.bool and known and one and len(walk.shape(mask)) <= len(walk.shape(x)):
        return batch_axes.pop()
    return None


def move(walk: Walker, node: Node) -> State:
    """Picks and writes by index: aligned along another axis, or by moving sample numbers."""
    if (batch_axis := _masked(walk, node)) is not None:
        return separate(batch_axis)
    if (batch_axis := labels.aligned(walk, node)) is not None:
        return separate(batch_axis)
    moved = labels.moved(walk, node)
    return LOST if moved is None else _single_or(moved)


def _single_or(batch_axis: BatchAxis) -> State:
    return State(Interaction.SEPARATE, one=batch_axis.start) if batch_axis.batch == 1 else separate(batch_axis)


def unknown(walk: Walker, node: Node) -> State:
    """An op without a rule is tried on random values: which slices change when a sample does?"""
    return separate(labels.tried(walk, node))


def created(walk: Walker, node: Node) -> State:
    return NONE


FOLLOW: Mapping[Samples, Follow] = {
    Samples.AFFINE: affine,
    Samples.BAGS: bags,
    Samples.CAT: cat,
    Samples.CONVOLUTION: convolution,
    Samples.CREATED: created,
    Samples.ELEMENTWISE: elementwise,
    Samples.EXPAND: expand,
    Samples.FLIP: flip,
    Samples.INDEX: move,
    Samples.LEADING: leading,
    Samples.PAD: pad,
    Samples.PERMUTE: permute,
    Samples.PRODUCT: product,
    Samples.REDUCTION: reduction,
    Samples.REPEAT: repeat,
    Samples.RESHAPE: reshape,
    Samples.ROLL: roll,
    Samples.ROWS: rows,
    Samples.SELECT: select,
    Samples.SELECT_WRITE: select_write,
    Samples.SEQUENCE: sequence,
    Samples.SLICE: narrow,
    Samples.SLICE_WRITE: slice_write,
    Samples.SPATIAL: spatial,
    Samples.STACK: stack,
    Samples.SUM: linear_reduction,
    Samples.TRANSPOSE: transpose,
    Samples.UNFOLD: unfold,
    Samples.UNKNOWN: unknown,
}
# Those that follow an axis by arithmetic alone.
ARITHMETIC = frozenset(Samples) - {
    Samples.BAGS,
    Samples.CAT,
    Samples.CREATED,
    Samples.INDEX,
    Samples.SELECT_WRITE,
    Samples.SLICE_WRITE,
    Samples.STACK,
    Samples.UNKNOWN,
}
# Ops that have no rule: they carry no derivatives here, or are differentiated by autograd. By name, of any overload.
_WITHOUT_RULE: Mapping[Samples, str] = {
    Samples.BAGS: "_embedding_bag _embedding_bag_forward_only embedding_bag",
    Samples.CREATED: "zeros_like ones_like empty_like full_like rand_like randn_like "
    "new_zeros new_ones new_empty new_full",
    Samples.ELEMENTWISE: "detach copy native_dropout bernoulli",
    Samples.INDEX: "scatter_reduce index_copy index_fill take take_along_dim as_strided",
    Samples.LEADING: "grid_sampler_2d grid_sampler_3d affine_grid_generator _cdist_forward",
    Samples.REDUCTION: "prod any all argmax argmin count_nonzero var std nansum linalg_vector_norm norm nanmedian",
    Samples.RESHAPE: "flatten unflatten",
    Samples.SEQUENCE: "cumprod logcumsumexp cummax cummin argsort glu renorm "
    "view_as_complex view_as_real _fft_r2c _fft_c2c _fft_c2r",
}
_NAMED = {f"aten.{name}": batch for batch, names in _WITHOUT_RULE.items() for name in names.split()}
_SPATIAL = ("pool", "upsample", "_pad", "nearest_exact")


def samples_of(node: Node) -> Samples:
    """What the node's op does to the axis of the samples."""
    rule, name = RULES.get(node.op), node.op.rsplit(".", 1)[0]
    if rule is not None:
        return rule.samples
    if name in _NAMED:
        return _NAMED[name]
    if is_elementwise(node):
        return Samples.ELEMENTWISE
    return Samples.SPATIAL if any(word in node.op for word in _SPATIAL) else Samples.UNKNOWN
