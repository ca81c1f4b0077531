"""What each family of ops does to the batch axis: a rule takes a node and says how it depends on samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dag_hesse._capture import labels
from dag_hesse._capture.batch_axis import FREE, along, reshaped
from dag_hesse.ir import BatchAxis, Interaction, Node
from dag_hesse.rules.base import Samples
from dag_hesse.rules.structural import axes
from dag_hesse.rules.table import RULES

if TYPE_CHECKING:
    from dag_hesse._capture.interaction import Walker


@dataclass(frozen=True, slots=True)
class State:
    """How a tensor depends on samples. ``one``: on the sample of this number alone; ``lost``: nobody knows where."""

    interaction: Interaction
    batch_axis: BatchAxis | None = None
    one: int = -1
    lost: bool = False

    @property
    def free(self) -> bool:
        """The same for all samples."""
        return self.interaction is Interaction.NONE and self.batch_axis is None and not self.lost


NONE = State(Interaction.NONE)
GONE = State(Interaction.MIXED)  # reduced over the batch: there is no batch axis any more
LOST = State(Interaction.MIXED, lost=True)


def separate(batch_axis: BatchAxis | None) -> State:
    """Slices along a batch axis that depend on their own sample; lost where there is none."""
    return LOST if batch_axis is None else State(Interaction.SEPARATE, batch_axis)


def mixed(batch_axis: BatchAxis | None) -> State:
    """Samples interact; their axis may still be known."""
    return State(Interaction.MIXED, batch_axis)


def option(node: Node, name: str, default: Any = None) -> Any:
    """An argument of the node's op by the name that its schema gives it."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name) if name in names else len(node.args)
    return node.args[place] if place < len(node.args) else default


Follow = Callable[["Walker", Node], State]


def is_elementwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_linear(node: Node) -> bool:
    """Whether a sum over samples stays one."""
    rule = RULES.get(node.op)
    return rule is not None and rule.linear


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
        return LOST if line is None else _of_line(line, batch_axis.axis + len(node.shape) - ndim)

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
    return _of_line(batch_axis.line(), batch_axis.axis)


def select(walk: Walker, node: Node) -> State:
    batch_axis, ndim = only(walk, node), len(walk.shape(node.inputs[0]))
    if batch_axis is None:
        return LOST
    dim = _dim(node, ndim)
    if dim == batch_axis.axis:
        return State(Interaction.SEPARATE, one=int(batch_axis.line()[option(node, "index")]))
    return _of_line(batch_axis.line(), batch_axis.axis - (dim < batch_axis.axis))


def _of_line(line: torch.Tensor, axis: int) -> State:
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
    return _of_line(torch.cat(pieces(dim)), dim)


def _unsqueezed(batch_axis: BatchAxis | None, dim: int) -> BatchAxis | None:
    return batch_axis and batch_axis.at(batch_axis.axis + (batch_axis.axis >= dim))


def slice_write(walk: Walker, node: Node) -> State:
    window = labels.span(option(node, "start"), option(node, "end"), option(node, "step", 1))
    value = node.inputs[1]
    return _written(walk, node, window, walk.states[value].batch_axis, lambda dim: walk.line(value, dim))


def select_write(walk: Walker, node: Node) -> State:
    dim, index = axes(option(node, "dim", 0), len(node.shape))[0], option(node, "index")
    value = walk.states[node.inputs[1]]
    window = labels.span(index, index % node.shape[dim] + 1, 1)
    one = torch.tensor([value.one], device="cpu")
    return _written(walk, node, window, _unsqueezed(value.batch_axis, dim), lambda dim: one)


def _written(
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
    return _of_line(line, dim)


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
    return _of_line(torch.stack([b[0] for b in bag]), 0) if whole else LOST


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
    Samples.FLIP: along_axis(_flip),
    Samples.INDEX: move,
    Samples.LEADING: leading,
    Samples.PAD: along_axis(_pad),
    Samples.PERMUTE: permute,
    Samples.PRODUCT: product,
    Samples.REDUCTION: reduction,
    Samples.REPEAT: along_axis(_repeat),
    Samples.RESHAPE: reshape,
    Samples.ROLL: along_axis(_roll),
    Samples.ROWS: rows,
    Samples.SELECT: select,
    Samples.SELECT_WRITE: select_write,
    Samples.SEQUENCE: sequence,
    Samples.SLICE: along_axis(_slice),
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
