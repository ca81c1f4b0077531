"""Rows and elements picked by integer indices, and extrema (which pick by value)."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Ref, fill
from dag_hesse.kernels.arena import is_dense
from dag_hesse.rules.base import Call, Residual, Rule, Samples, no_pairs
from dag_hesse.rules.linear import linear, shell
from dag_hesse.rules.single import Single
from dag_hesse.rules.structural import axes

aten = torch.ops.aten


def _zeros(c: Call, g: Tensor, slot: int = 0) -> Tensor:
    return g.new_zeros(c.shape(slot))


def _without_masks(c: Call) -> Call:
    """An indexing with its masks looked up: as places, one index tensor an axis."""
    values, indices = list(c.values), list[Ref | None]()
    for ref in c.node.args[1]:
        if ref is None or c.values[ref.slot].dtype not in (torch.bool, torch.uint8):
            indices.append(ref)
            continue
        places = c.values[ref.slot].nonzero(as_tuple=True)
        indices += [Ref(len(values) + k) for k in range(len(places))]
        values += places
    if len(values) == len(c.values):
        return c
    node = replace(c.node, args=(c.node.args[0], indices, *c.node.args[2:]))
    active = *c.active, *[False] * (len(values) - len(c.values))
    return replace(c, node=node, values=tuple(values), active=active)


def _index(c: Call, g: Tensor, slot: int) -> Tensor:
    indices = [None if ref is None else c.values[ref.slot] for ref in c.node.args[1]]
    return aten.index_put(_zeros(c, g), indices, g, True)


def _index_select(c: Call, g: Tensor, slot: int) -> Tensor:
    return _zeros(c, g).index_add(c.argument(1), c.argument(2), g)


def _gather(c: Call, g: Tensor, slot: int) -> Tensor:
    shape, strides = c.shape(), c.values[0].stride()
    laid_out = g.new_empty_strided(shape, strides) if is_dense(c.values[0]) else g.new_empty(shape)
    return laid_out.zero_().scatter_add_(c.argument(1), c.argument(2), g)


def _embedding_forward(c: Call, inputs: tuple[Tensor, ...]) -> Tensor:
    rows = inputs[0][inputs[1]]
    padding = c.argument(2, "padding_idx", -1)
    # Autograd never differentiates the padding row, so neither tangent nor adjoint passes it.
    return rows if padding < 0 else rows * (inputs[1] != padding).unsqueeze(-1)


def _embedding(c: Call, g: Tensor, slot: int) -> Tensor:
    index, padding = c.values[1].reshape(-1), c.argument(2, "padding_idx", -1)
    rows = g.reshape(-1, g.shape[-1])
    if padding >= 0:
        rows = rows * (index != padding).unsqueeze(-1)
    return _zeros(c, g).index_add_(0, index, rows)


def _scatter(c: Call, g: Tensor, slot: int) -> Tensor:
    dim, index = c.argument(1), c.argument(2)
    return g.scatter(dim, index, 0.0) if slot == 0 else _first_rows(g.gather(dim, index), c.shape(slot))


def _scatter_add(c: Call, g: Tensor, slot: int) -> Tensor:
    return g if slot == 0 else _first_rows(g.gather(c.argument(1), c.argument(2)), c.shape(slot))


def _first_rows(g: Tensor, shape: torch.Size) -> Tensor:
    """Pad with zeros up to ``shape`` (a scatter source may be larger than its index)."""
    padding = [p for have, want in zip(reversed(g.shape), reversed(shape), strict=True) for p in (0, want - have)]
    return torch.constant_pad_nd(g, padding) if any(padding) else g


def _scatter_value(c: Call, g: Tensor, slot: int) -> Tensor:
    return g.scatter(c.argument(1), c.argument(2), 0.0)


def _scatter_value_forward(c: Call, inputs: tuple[Tensor, ...]) -> Tensor:
    return inputs[0].scatter(c.argument(1), c.argument(2), 0.0)


def _index_add(c: Call, g: Tensor, slot: int) -> Tensor:
    return g if slot == 0 else g.index_select(c.argument(1), c.argument(2)) * c.node.kwargs.get("alpha", 1)


def _index_put(c: Call, g: Tensor, slot: int) -> Tensor:
    indices = [None if ref is None else c.values[ref.slot] for ref in c.node.args[1]]
    if slot != 0:
        return aten.index(g, indices).sum_to_size(c.shape(slot))
    return g if c.argument(3, "accumulate", False) else aten.index_put(g, indices, g.new_zeros(()))


def _slice_scatter(c: Call, g: Tensor, slot: int) -> Tensor:
    dim, start, end, step = (c.argument(k, n, d) for k, n, d in _SLICE)
    if slot == 1:
        return aten.slice(g, dim, start, end, step)
    return aten.slice_scatter(g, g.new_zeros(c.shape(1)), dim, start, end, step)


_SLICE = ((2, "dim", 0), (3, "start", None), (4, "end", None), (5, "step", 1))


def _select_scatter(c: Call, g: Tensor, slot: int) -> Tensor:
    dim, index = c.argument(2), c.argument(3)
    return g.select(dim, index) if slot == 1 else aten.select_scatter(g, g.new_zeros(c.shape(1)), dim, index)


@final
class _Picked(Single):
    """Output elements are input elements along ``dim``, at saved indices (max.dim, sort, topk, …)."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        shape = call.shape()
        results = _results(call)
        self.dim = int(call.argument(_DIM_POSITION.get(call.node.op, 1), "dim", -1)) % max(len(shape), 1)
        self.shape, self.out_shape = shape, call.value.shape
        index = results[1]
        self.index = index if index.ndim == len(shape) else index.unsqueeze(self.dim)

    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        picked = x.gather(self.dim + 1, self.index.expand(x.shape[0], *self.index.shape))
        return picked.reshape(x.shape[0], *self.out_shape), None

    def transpose(self, g: Tensor) -> Tensor:
        index = self.index.expand(len(g), *self.index.shape)
        return g.new_zeros(len(g), *self.shape).scatter_add(self.dim + 1, index, g.reshape(index.shape))


def _results(call: Call) -> tuple[Tensor, ...]:
    """Run the op again for all its results: the indices are wanted here, the values were there."""
    args, kwargs = fill(call.node, call.values)
    return call.node.target(*args, **kwargs)  # type: ignore[misc]


_DIM_POSITION = {"aten.topk.default": 2, "aten.kthvalue.default": 2}


def _cells_lie_evenly(x: Tensor, spatial: int) -> bool:
    """Whether the spatial axes are one in memory, as in the usual layouts."""
    shape, strides = x.shape[-spatial:], x.stride()[-spatial:]
    return is_dense(x) and all(strides[k] == strides[k + 1] * shape[k + 1] for k in range(spatial - 1))


@final
class _MaxPool(Single):
    """Windows' maxima: gather at the flattened spatial index that pooling returned."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.spatial = 3 if "3d" in call.node.op else 2
        self.out_shape, self.index = call.value.shape, _results(call)[1].flatten(-self.spatial)
        x = call.values[0]
        self.like = shell(x if _cells_lie_evenly(x, self.spatial) else x.contiguous())

    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        picked = x.flatten(-self.spatial).gather(-1, self.index.expand(len(x), *self.index.shape))
        return picked.reshape(len(x), *self.out_shape), None

    def transpose(self, g: Tensor) -> Tensor:
        found = self.arena.empty_as(g, self.like).zero_()
        lead, cells = found.shape[: -self.spatial], prod(found.shape[-self.spatial :])
        index = self.index.expand(len(g), *self.index.shape)
        found.view(*lead, cells).scatter_add_(-1, index, g.flatten(-self.spatial))
        return found


@final
class _Extremum(Single):
    """amax/amin and full max/min: ties share the derivative evenly, as in autograd."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        x = call.values[0]
        self.dims = axes(call.argument(1, "dim"), x.ndim)
        keep = [1 if k in self.dims else n for k, n in enumerate(x.shape)]
        ties = (x == call.value.reshape(keep)).to(x.dtype)
        self.share = ties / ties.sum(self.dims, keepdim=True)
        self.kept_shape, self.out_shape = keep, call.value.shape

    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        total = (self.share * x).sum([d + 1 for d in self.dims])
        return total.reshape(len(x), *self.out_shape), None

    def transpose(self, g: Tensor) -> Tensor:
        return self.share * g.reshape(len(g), *self.kept_shape)


def _piecewise(linearize: type[Single], samples: Samples) -> Rule:
    return Rule(Kind.PIECEWISE_LINEAR, linearize, no_pairs, samples)


def _by_index(transpose: Any, samples: Samples = Samples.INDEX, **options: Any) -> Rule:
    return linear(transpose, samples, kind=Kind.GATHER, **options)


_PICKED = ("max.dim", "min.dim", "sort.default", "topk.default", "kthvalue.default", "median.dim", "mode.default")

TABLE: dict[str, Rule] = {
    "aten.index.Tensor": _by_index(_index, prepare=_without_masks),
    "aten._unsafe_index.Tensor": _by_index(_index, prepare=_without_masks),
    "aten.index_select.default": _by_index(_index_select),
    "aten.gather.default": _by_index(_gather),
    "aten.embedding.default": _by_index(_embedding, Samples.ROWS, forward=_embedding_forward),
    "aten.scatter.src": _by_index(_scatter),
    "aten.scatter.value": _by_index(_scatter_value, forward=_scatter_value_forward),
    "aten.scatter_add.default": _by_index(_scatter_add),
    "aten.index_add.default": _by_index(_index_add),
    "aten.index_put.default": _by_index(_index_put, prepare=_without_masks),
    "aten._unsafe_index_put.default": _by_index(_index_put, prepare=_without_masks),
    "aten.slice_scatter.default": _by_index(_slice_scatter, Samples.SLICE_WRITE),
    "aten.select_scatter.default": _by_index(_select_scatter, Samples.SELECT_WRITE),
    **{f"aten.{name}": _piecewise(_Picked, Samples.SEQUENCE) for name in _PICKED},
    **{f"aten.{name}.default": _piecewise(_Extremum, Samples.REDUCTION) for name in ("amax", "amin", "max", "min")},
    "aten.max_pool2d_with_indices.default": _piecewise(_MaxPool, Samples.SPATIAL),
    "aten.max_pool3d_with_indices.default": _piecewise(_MaxPool, Samples.SPATIAL),
    "aten.adaptive_max_pool2d.default": _piecewise(_MaxPool, Samples.SPATIAL),
    "aten.adaptive_max_pool3d.default": _piecewise(_MaxPool, Samples.SPATIAL),
}

__all__ = ["TABLE"]
