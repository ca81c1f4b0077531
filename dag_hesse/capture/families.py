"""What each family of ops does to the batch axis: a rule takes a node and says how it depends on samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dag_hesse.capture import labels
from dag_hesse.capture.layout import FREE, Place, along, reshaped
from dag_hesse.ir import Coupling, Kind, Node
from dag_hesse.rules.structural import axes

if TYPE_CHECKING:
    from dag_hesse.capture.coupling import Walker


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


Rule = Callable[["Walker", Node], State]


def is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_linear(node: Node) -> bool:
    return node.kind is Kind.STRUCTURAL or node.op.rsplit(".", 1)[0] in LINEAR or node.op in LINEAR_SCALARS


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
    place, ndim = only(walk, node), len(node.shape)
    order = list(range(ndim))
    if "permute" in node.op:
        order = axes(option(node, "dims"), ndim)
    elif ndim > 1:
        one, other = (
            (0, 1) if node.op.startswith("aten.t.") else axes([option(node, "dim0"), option(node, "dim1")], ndim)
        )
        order[one], order[other] = other, one
    return separate(place and place.at(order.index(place.axis)))


def expand(walk: Walker, node: Node) -> State:
    place, more = only(walk, node), len(node.shape) - len(walk.shape(node.inputs[0]))
    if place is not None and node.shape[place.axis + more] != place.size:
        place = replace(place, outer=node.shape[place.axis + more])  # a batch of one
    return separate(place and place.at(place.axis + more))


def pick(walk: Walker, node: Node) -> State:
    """Ops that pick along axes: run on the line of the batch axis."""
    k = node.inputs[0]
    place, ndim = walk.states[k].place, len(walk.shape(k))
    if place is None:
        return LOST
    line, axis = place.line(), place.axis
    name, dim = node.op.split(".")[1], axes(option(node, "dim", option(node, "dimension", 0)), ndim)[0]
    if name == "slice":
        line = (
            line
            if dim != axis
            else line[labels.span(option(node, "start"), option(node, "end"), option(node, "step", 1))]
        )
    elif name == "select":
        if dim == axis:
            return State(Coupling.SEPARATE, one=int(line[option(node, "index")]))
        axis -= dim < axis
    elif name == "flip":
        line = line.flip(0) if axis in axes(option(node, "dims"), ndim) else line
    elif name == "roll":
        dims, shifts = option(node, "dims", []), option(node, "shifts")
        if not dims:
            return LOST
        line = line.roll(sum(s for s, d in zip(shifts, axes(dims, ndim), strict=True) if d == axis))
    elif name == "constant_pad_nd":
        pads, after = option(node, "pad"), 2 * (ndim - 1 - axis)
        line = torch.constant_pad_nd(line, pads[after : after + 2], FREE) if after < len(pads) else line
    elif name == "repeat":
        repeats = option(node, "repeats")
        axis += len(repeats) - ndim
        line = line.repeat(repeats[axis])
    elif name == "unfold" and dim == axis:
        return LOST
    return _of_line(line, axis)


def _of_line(line: torch.Tensor, axis: int) -> State:
    place = along(line, axis)
    if place is not None and place.batch == 1:
        return State(Coupling.SEPARATE, place if place.start == 0 else None, one=place.start)
    return separate(place)


def cat(walk: Walker, node: Node) -> State:
    inputs = [node.inputs[ref.slot] for ref in node.args[0]]
    stack = node.op.startswith("aten.stack")
    inputs = [k for k in inputs if stack or len(walk.shape(k)) == len(node.shape)]  # an old cat() takes empty vectors
    dim = axes(option(node, "dim", 0), len(node.shape))[0]
    moved = [_unsqueezed(walk.states[k].place, dim) if stack else walk.states[k].place for k in inputs]
    places = {p for p in moved if p is not None}
    if places and all(p.axis != dim for p in places):
        return separate(places.pop()) if len(places) == 1 else LOST
    ones = [walk.states[k].one for k in inputs]
    pieces = [torch.tensor([one], device="cpu") for one in ones] if stack else [walk.line(k, dim) for k in inputs]
    return _of_line(torch.cat(pieces), dim)


def _unsqueezed(place: Place | None, dim: int) -> Place | None:
    return place and place.at(place.axis + (place.axis >= dim))


def write(walk: Walker, node: Node) -> State:
    """slice_scatter and select_scatter."""
    into, source = node.inputs[:2]
    ndim = len(node.shape)
    dim = axes(option(node, "dim", 0), ndim)[0]
    a, b = walk.states[into].place, walk.states[source].place
    if "select" in node.op:
        b = _unsqueezed(b, dim)
        window = labels.span(option(node, "index"), option(node, "index") % node.shape[dim] + 1, 1)
    else:
        window = labels.span(option(node, "start"), option(node, "end"), option(node, "step", 1))
    if all(p is None or p.axis != dim for p in (a, b)) and walk.states[source].one < 0:
        return separate(a or b) if a is None or b is None or a == b else mixed(a)
    if any(p is not None and p.axis != dim for p in (a, b)):
        return mixed(a)
    line = walk.line(into, dim).clone()
    line[window] = (
        torch.tensor([walk.states[source].one], device="cpu") if "select" in node.op else walk.line(source, dim)
    )
    return _of_line(line, dim)


def reduction(walk: Walker, node: Node) -> State:
    k = node.inputs[0]
    state, ndim = walk.states[k], len(walk.shape(k))
    if state.place is None:
        return State(Coupling.SUMMED) if is_sum(node) else GONE
    dims = axes(option(node, "dim"), ndim)
    if state.place.axis in dims:
        return State(Coupling.SUMMED) if is_sum(node) else GONE
    shift = 0 if len(node.shape) == ndim else sum(d < state.place.axis for d in dims)
    return separate(state.place.at(state.place.axis - shift))


def is_sum(node: Node) -> bool:
    return node.op.rsplit(".", 1)[0] in ("aten.sum", "aten.mean")


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
    """A batch that is folded into the channels, every group of them being of one sample."""
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


def _table(entries: Mapping[str, Rule]) -> dict[str, Rule]:
    return {
        f"{'' if '.' in name else 'aten.'}{name}": rule for names, rule in entries.items() for name in names.split()
    }


FAMILIES: Mapping[str, Rule] = _table(
    {
        "view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten unflatten": reshape,
        "permute transpose t": permute,
        "expand": expand,
        "slice select flip roll constant_pad_nd repeat unfold": pick,
        "cat stack": cat,
        "slice_scatter select_scatter": write,
        "sum mean amax amin logsumexp prod any all argmax argmin count_nonzero var std nansum": reduction,
        "linalg_vector_norm norm": reduction,
        "_softmax _safe_softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin sort argsort topk": sequence,
        "kthvalue mode glu renorm dag_hesse.standardize": sequence,
        "view_as_complex view_as_real _fft_r2c _fft_c2c _fft_c2r": sequence,
        "mm bmm dag_hesse.mm_bias": product,
        "convolution": convolution,
        "im2col col2im grid_sampler_2d grid_sampler_3d affine_grid_generator _cdist_forward": leading,
        "dag_hesse.batch_affine": affine,
        "embedding": rows,
        "_embedding_bag _embedding_bag_forward_only embedding_bag": bags,
        "index _unsafe_index index_select gather scatter scatter_add scatter_reduce index_add index_put": move,
        "_unsafe_index_put index_copy index_fill take take_along_dim diagonal as_strided": move,
        "_to_copy tril triu clone alias lift_fresh_copy dag_hesse.tap native_dropout detach copy": elementwise,
        "bernoulli masked_fill where": elementwise,
    }
)
# With a dim these run along it, without they are reductions of everything.
FAMILIES = {
    **FAMILIES,
    **{
        f"aten.{name}": (lambda w, n: (sequence if len(n.args) > 1 else reduction)(w, n))
        for name in ("max", "min", "median", "nanmedian")
    },
}
ARITHMETIC = frozenset(
    {
        reshape,
        permute,
        expand,
        pick,
        elementwise,
        reduction,
        sequence,
        product,
        convolution,
        leading,
        spatial,
        affine,
        rows,
    }
)
LINEAR = frozenset(f"aten.{name}" for name in ("add", "sub", "neg", "sum", "mean"))
LINEAR_SCALARS = frozenset({"aten.mul.Scalar", "aten.div.Scalar"})
_LIKE = ("zeros", "ones", "empty", "full", "rand", "randn")
CREATED = frozenset(
    [f"aten.{name}_like.default" for name in _LIKE]
    + [f"aten.new_{name}.default" for name in ("zeros", "ones", "empty", "full")]
)
