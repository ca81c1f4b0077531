"""What each family of ops does to the batch axis: a rule takes a node and says how it depends on samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dag_hesse._capture import labels
from dag_hesse._capture.layout import FREE, Place, along, reshaped
from dag_hesse.ir import Coupling, Node
from dag_hesse.rules.base import Samples
from dag_hesse.rules.structural import axes
from dag_hesse.rules.table import RULES

if TYPE_CHECKING:
    from dag_hesse._capture.coupling import Walker


@dataclass(frozen=True, slots=True)
class State:
    """How a tensor depends on samples. ``one``: on the sample of this number alone; ``lost``: nobody knows where."""

    coupling: Coupling
    place: Place | None = None
    one: int = -1
    lost: bool = False

    @property
    def free(self) -> bool:
        """The same for all samples."""
        return self.coupling is Coupling.NONE and self.place is None and not self.lost


NONE = State(Coupling.NONE)
GONE = State(Coupling.MIXED)  # reduced over the batch: there is no batch axis any more
LOST = State(Coupling.MIXED, lost=True)


def separate(place: Place | None) -> State:
    """Slices along a place that depend on their own sample; lost where there is no place."""
    return LOST if place is None else State(Coupling.SEPARATE, place)


def mixed(place: Place | None) -> State:
    """Samples interact; their axis may still be known."""
    return State(Coupling.MIXED, place)


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
    places: list[Place] = []
    for k in node.inputs:
        if (place := walk.states[k].place) is not None:
            places.append(place.at(place.axis + len(node.shape) - len(walk.shape(k))))
    if any(walk.states[k].one >= 0 for k in node.inputs) and walk.size > 1:
        return State(Coupling.SUMMED) if is_linear(node) and not places else mixed(places[0] if places else None)
    fits = all(0 <= p.axis < len(node.shape) and node.shape[p.axis] == p.size for p in places)
    if not fits or any(place != places[0] for place in places):
        return mixed(places[0]) if fits else LOST
    return separate(places[0])


def only(walk: Walker, node: Node) -> Place | None:
    """The place of the first input."""
    return walk.states[node.inputs[0]].place


def reshape(walk: Walker, node: Node) -> State:
    place = only(walk, node)
    return separate(place and reshaped(place, walk.shape(node.inputs[0]), node.shape))


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
    place = only(walk, node)
    return separate(place and place.at(order.index(place.axis)))


def expand(walk: Walker, node: Node) -> State:
    place, more = only(walk, node), len(node.shape) - len(walk.shape(node.inputs[0]))
    if place is not None and node.shape[place.axis + more] != place.size:
        place = replace(place, outer=node.shape[place.axis + more])  # a batch of one
    return separate(place and place.at(place.axis + more))


Line = Callable[[Node, torch.Tensor, int, int], torch.Tensor | None]


def along_axis(change: Line) -> Follow:
    """Ops that pick along axes: ``change(node, line of the batch axis, that axis, ndim)``; None where it is lost."""

    def follow(walk: Walker, node: Node) -> State:
        k = node.inputs[0]
        place, ndim = walk.states[k].place, len(walk.shape(k))
        if place is None:
            return LOST
        line = change(node, place.line(), place.axis, ndim)
        return LOST if line is None else _of_line(line, place.axis + len(node.shape) - ndim)

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
    place = only(walk, node)
    if place is None or _dim(node, len(walk.shape(node.inputs[0]))) == place.axis:
        return LOST
    return _of_line(place.line(), place.axis)


def select(walk: Walker, node: Node) -> State:
    place, ndim = only(walk, node), len(walk.shape(node.inputs[0]))
    if place is None:
        return LOST
    dim = _dim(node, ndim)
    if dim == place.axis:
        return State(Coupling.SEPARATE, one=int(place.line()[option(node, "index")]))
    return _of_line(place.line(), place.axis - (dim < place.axis))


def _of_line(line: torch.Tensor, axis: int) -> State:
    place = along(line, axis)
    if place is not None and place.batch == 1:
        return State(Coupling.SEPARATE, place if place.start == 0 else None, one=place.start)
    return separate(place)


def cat(walk: Walker, node: Node) -> State:
    inputs = [node.inputs[ref.slot] for ref in node.args[0]]
    inputs = [k for k in inputs if len(walk.shape(k)) == len(node.shape)]  # an old cat() takes empty vectors
    return _joined(node, [walk.states[k].place for k in inputs], lambda dim: [walk.line(k, dim) for k in inputs])


def stack(walk: Walker, node: Node) -> State:
    dim = axes(option(node, "dim", 0), len(node.shape))[0]
    states = [walk.states[node.inputs[ref.slot]] for ref in node.args[0]]
    moved = [_unsqueezed(s.place, dim) for s in states]
    return _joined(node, moved, lambda dim: [torch.tensor([s.one], device="cpu") for s in states])


def _joined(node: Node, places: Sequence[Place | None], pieces: Callable[[int], list[torch.Tensor]]) -> State:
    """Tensors side by side along the op's ``dim``: where the samples lie along that, ``pieces`` of their line."""
    dim = axes(option(node, "dim", 0), len(node.shape))[0]
    known = {p for p in places if p is not None}
    if known and all(p.axis != dim for p in known):
        return separate(known.pop()) if len(known) == 1 else LOST
    return _of_line(torch.cat(pieces(dim)), dim)


def _unsqueezed(place: Place | None, dim: int) -> Place | None:
    return place and place.at(place.axis + (place.axis >= dim))


def slice_write(walk: Walker, node: Node) -> State:
    window = labels.span(option(node, "start"), option(node, "end"), option(node, "step", 1))
    source = node.inputs[1]
    return _written(walk, node, window, walk.states[source].place, lambda dim: walk.line(source, dim))


def select_write(walk: Walker, node: Node) -> State:
    dim, index = axes(option(node, "dim", 0), len(node.shape))[0], option(node, "index")
    source = walk.states[node.inputs[1]]
    window = labels.span(index, index % node.shape[dim] + 1, 1)
    one = torch.tensor([source.one], device="cpu")
    return _written(walk, node, window, _unsqueezed(source.place, dim), lambda dim: one)


def _written(walk: Walker, node: Node, window: slice, b: Place | None, piece: Callable[[int], torch.Tensor]) -> State:
    """A tensor with a ``window`` of its ``dim`` overwritten by one whose samples lie at ``b``."""
    into, source = node.inputs[:2]
    dim, a = axes(option(node, "dim", 0), len(node.shape))[0], walk.states[into].place
    if all(p is None or p.axis != dim for p in (a, b)) and walk.states[source].one < 0:
        return separate(a or b) if a is None or b is None or a == b else mixed(a)
    if any(p is not None and p.axis != dim for p in (a, b)):
        return mixed(a)
    line = walk.line(into, dim).clone()
    line[window] = piece(dim)
    return _of_line(line, dim)


def reduction(walk: Walker, node: Node) -> State:
    return _reduced(walk, node, GONE)


def linear_reduction(walk: Walker, node: Node) -> State:
    return _reduced(walk, node, State(Coupling.SUMMED))


def _reduced(walk: Walker, node: Node, over_samples: State) -> State:
    k = node.inputs[0]
    state, ndim = walk.states[k], len(walk.shape(k))
    dims = axes(option(node, "dim"), ndim)
    if state.place is None or state.place.axis in dims:
        return over_samples
    shift = 0 if len(node.shape) == ndim else sum(d < state.place.axis for d in dims)
    return separate(state.place.at(state.place.axis - shift))


def sequence(walk: Walker, node: Node) -> State:
    """Ops that mix elements along some axes and keep the others."""
    k = node.inputs[0]
    place, ndim = walk.states[k].place, len(walk.shape(k))
    if place is None:
        return GONE
    dims = axes(option(node, "dims", option(node, "dim", -1)), ndim)
    same = len(node.shape) == ndim
    if place.axis in dims:
        return mixed(place) if same and node.shape[place.axis] == place.size else GONE
    return separate(place.at(place.axis - (0 if same else sum(d < place.axis for d in dims))))


def product(walk: Walker, node: Node) -> State:
    """mm, bmm and their kin: a stack of products where all have it, rows, columns, and what is summed over."""
    a, b = (walk.states[k].place for k in node.inputs[:2])
    last = len(node.shape) - 1  # rows of a at last - 1, columns of b at last
    summed = (a is None or a.axis == last) and (b is None or b.axis == last - 1)
    if summed and (a is None or b is None or a.at(0) == b.at(0)):
        return State(Coupling.SUMMED)  # Σ over samples of a term each
    if a and b:
        if last == 2 and a == b and a.axis == 0:
            return separate(a)
        return mixed(a if a.axis < last else b if b.axis != last - 1 else None)
    place = a or b
    return elementwise(walk, node) if place is None else separate(place)


def convolution(walk: Walker, node: Node) -> State:
    x, w = (walk.states[k] for k in node.inputs[:2])
    if any(not walk.states[k].free for k in node.inputs[2:]) or x.place is None:
        return LOST
    if x.place.axis == 0:
        return separate(x.place) if w.free else mixed(x.place)
    return _grouped(walk, node, x.place, w.place) if x.place.axis == 1 else LOST


def _grouped(walk: Walker, node: Node, x: Place, w: Place | None) -> State:
    """A batch that is folded into the image channels, every group of them being of one sample."""
    groups, transposed = option(node, "groups"), option(node, "transposed")
    into, out = walk.shape(node.inputs[0])[1] // groups, node.shape[1] // groups
    if x.inner % into or transposed:
        return mixed(x) if node.shape[1] == x.size else LOST
    place = replace(x, inner=x.inner // into * out)
    return separate(place) if w is None or w.at(1) == place else mixed(place)


def leading(walk: Walker, node: Node) -> State:
    """Ops that do the same to every slice of their first axis."""
    states = [walk.states[k] for k in node.inputs]
    places = {s.place for s in states if s.place is not None}
    place = places.pop() if len(places) == 1 else None
    return separate(place if place and place.axis == 0 and node.shape[0] == place.size else None)


def spatial(walk: Walker, node: Node) -> State:
    """Ops over trailing axes, whose number is in their name."""
    digits = [int(c) for c in "123" if f"{c}d" in node.op]
    place, ndim = only(walk, node), len(walk.shape(node.inputs[0]))
    if place is None or place.axis >= ndim - (digits[0] if digits else 2) or len(node.shape) != ndim:
        return LOST
    return separate(place)


def affine(walk: Walker, node: Node) -> State:
    """BatchNorm with given statistics: they lie along axis 1."""
    x = only(walk, node)
    others = [p.at(1) for k in node.inputs[1:] if (p := walk.states[k].place) is not None]
    if x is None:
        return LOST
    return separate(x) if all(p == x for p in others) else mixed(x)


def rows(walk: Walker, node: Node) -> State:
    table, index = (walk.states[k] for k in node.inputs[:2])
    return separate(index.place) if table.free else LOST


def bags(walk: Walker, node: Node) -> State:
    """EmbeddingBag: a bag per offset. Offsets that count off the samples' rows put one bag after the other."""
    table, index, offsets = (walk.states[k] for k in node.inputs[:3])
    if not table.free or node.output not in (None, 0):
        return LOST
    if offsets.place is not None:
        return separate(offsets.place)
    starts, place = walk.constants.value(node.inputs[2]), index.place
    if starts is None or place is None:
        return LOST
    ends = torch.cat([starts[1:], torch.tensor([place.size], device="cpu")])[: node.shape[0]]
    line = place.line()
    bag = [line[s:e] for s, e in zip(starts.tolist(), ends.tolist(), strict=False)]
    whole = all(len(b) and bool((b == b[0]).all()) for b in bag)
    return _of_line(torch.stack([b[0] for b in bag]), 0) if whole else LOST


def _masked(walk: Walker, node: Node) -> Place | None:
    """One value written where a mask of the tensor's own samples says so."""
    if node.op.split(".")[1] != "index_put" or len(node.inputs) != 3 or len(node.args[1]) != 1:
        return None
    (x, mask, value), states = node.inputs, [walk.states[k] for k in node.inputs]
    places = {s.place for s in states[:2] if s.place is not None}
    known = all(s.place is not None or s.free for s in states[:2]) and len(places) == 1
    one = walk.graph.nodes[value].numel == 1 and states[2].free
    if walk.graph.nodes[mask].dtype is torch.bool and known and one and len(walk.shape(mask)) <= len(walk.shape(x)):
        return places.pop()
    return None


def move(walk: Walker, node: Node) -> State:
    """Picks and writes by index: aligned along another axis, or by moving sample numbers."""
    if (place := _masked(walk, node)) is not None:
        return separate(place)
    if (place := labels.aligned(walk, node)) is not None:
        return separate(place)
    moved = labels.moved(walk, node)
    return LOST if moved is None else _single_or(moved)


def _single_or(place: Place) -> State:
    return State(Coupling.SEPARATE, one=place.start) if place.batch == 1 else separate(place)


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
