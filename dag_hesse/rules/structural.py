"""Linear data movement, sums and pooling: the op itself moves tangents, its transpose moves adjoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from dag_hesse.ir.node import execute
from dag_hesse.rules.base import NOTHING, Call, Moves, Rule, Samples
from dag_hesse.rules.linear import linear, selection

aten = torch.ops.aten


def axes(dims: Any, ndim: int) -> list[int]:
    """Normalize a dim argument (None, int or list) to a list of non-negative axes."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    return [d % max(ndim, 1) for d in ([dims] if isinstance(dims, int) else dims)]


def _reshape(c: Call, g: Tensor, slot: int) -> Tensor:
    return g.reshape(c.shape())


def _permute(c: Call, g: Tensor, slot: int) -> Tensor:
    dims = axes(c.argument(1, "dims"), g.ndim)
    return g.permute([dims.index(k) for k in range(len(dims))])


def _expand(c: Call, g: Tensor, slot: int) -> Tensor:
    return g.sum_to_size(c.shape())


def _repeat(c: Call, g: Tensor, slot: int) -> Tensor:
    repeats, shape = c.argument(1, "repeats"), c.shape()
    padded = (*(1,) * (len(repeats) - len(shape)), *shape)
    folded = g.reshape([k for pair in zip(repeats, padded, strict=True) for k in pair])
    return folded.sum(list(range(0, 2 * len(repeats), 2))).reshape(shape)


def _cat(c: Call, g: Tensor, slot: int) -> Tensor:
    dim = axes(c.argument(1, "dim", 0), g.ndim)[0]
    slots = [ref.slot for ref in c.node.args[0]]
    start = sum(c.shape(p)[dim] for p in slots[: slots.index(slot)] if len(c.shape(p)) == g.ndim)
    return g.narrow(dim, start, c.shape(slot)[dim])


def _stack(c: Call, g: Tensor, slot: int) -> Tensor:
    slots = [ref.slot for ref in c.node.args[0]]
    return g.select(c.argument(1, "dim", 0), slots.index(slot))


def _flip(c: Call, g: Tensor, slot: int) -> Tensor:
    return g.flip(c.argument(1, "dims"))


def _roll(c: Call, g: Tensor, slot: int) -> Tensor:
    return torch.roll(g, [-s for s in c.argument(1, "shifts")], c.argument(2, "dims", []))


def _pad_forward(c: Call, inputs: tuple[Tensor, ...]) -> Tensor:
    return torch.constant_pad_nd(inputs[0], c.argument(1, "pad"), 0.0)


def _pad(c: Call, g: Tensor, slot: int) -> Tensor:
    return torch.constant_pad_nd(g, [-p for p in c.argument(1, "pad")], 0.0)


def _padding_backward(name: str) -> Rule:
    backward = getattr(aten, f"{name}_backward").default

    def transpose(c: Call, g: Tensor, slot: int) -> Tensor:
        return backward(g, g.new_zeros(c.shape()), c.argument(1, "padding"))

    return linear(transpose, Samples.SPATIAL)


def _cast(c: Call, g: Tensor, slot: int) -> Tensor:
    return g.to(dtype=c.values[0].dtype, device=c.values[0].device)


def _diagonal(c: Call, g: Tensor, slot: int) -> Tensor:
    return aten.diagonal_backward(
        g, c.shape(), c.argument(1, "offset", 0), c.argument(2, "dim1", 0), c.argument(3, "dim2", 1)
    )


def _diagonal_scatter(c: Call, g: Tensor, slot: int) -> Tensor:
    place = [c.argument(k, name, default) for k, name, default in ((2, "offset", 0), (3, "dim1", 0), (4, "dim2", 1))]
    return g.diagonal(*place) if slot == 1 else aten.diagonal_scatter(g, g.new_zeros(c.shape(1)), *place)


def _unfold(c: Call, g: Tensor, slot: int) -> Tensor:
    return aten.unfold_backward(g, c.shape(), *c.node.args[1:4])


def _same_op(c: Call, g: Tensor, slot: int) -> Tensor:
    return execute(c.node, [g])


def _spread(c: Call, g: Tensor, position: int = 1) -> Tensor:
    """Undo a reduction: insert the reduced axes and expand."""
    shape = c.shape()
    reduced = axes(c.argument(position, "dim"), len(shape))
    return g.reshape([1 if k in reduced else n for k, n in enumerate(shape)]).expand(shape)


def _sum(c: Call, g: Tensor, slot: int) -> Tensor:
    return _spread(c, g)


def _mean(c: Call, g: Tensor, slot: int) -> Tensor:
    shape = c.shape()
    count = prod(shape[k] for k in axes(c.argument(1, "dim"), len(shape)))
    return _spread(c, g / max(count, 1))


def _cumsum(c: Call, g: Tensor, slot: int) -> Tensor:
    dim = c.argument(1, "dim")
    return g.flip(dim).cumsum(dim).flip(dim)


def _pool(backward: Callable[..., Tensor], parameters: Sequence[tuple[int, str, Any]]) -> Rule:
    def transpose(c: Call, g: Tensor, slot: int) -> Tensor:
        return backward(g, g.new_zeros(c.shape()), *(c.argument(*parameter) for parameter in parameters))

    return linear(transpose, Samples.SPATIAL)


_AVERAGE: list[tuple[int, str, Any]] = [
    (1, "kernel_size", None),
    (2, "stride", []),
    (3, "padding", 0),
    (4, "ceil_mode", False),
    (5, "count_include_pad", True),
    (6, "divisor_override", None),
]


def _resample(name: str, parameters: int) -> Rule:
    """Interpolation: (input, output_size, *parameters); its backward also takes the input's size."""
    backward = getattr(aten, f"{name}_backward").default

    def transpose(c: Call, g: Tensor, slot: int) -> Tensor:
        size = c.argument(1, "output_size")
        rest = [c.node.args[k] if k < len(c.node.args) else None for k in range(2, 2 + parameters)]
        return backward(g.contiguous(), size, list(c.shape()), *rest)

    return linear(transpose, Samples.SPATIAL)


def _col2im(c: Call, g: Tensor, slot: int) -> Tensor:
    return aten.im2col(g, *c.node.args[2:])


def _im2col(c: Call, g: Tensor, slot: int) -> Tensor:
    return aten.col2im(g, list(c.shape()[-2:]), *c.node.args[1:])


def _copy() -> Rule:
    return linear(_reshape, Samples.ELEMENTWISE, moves=Moves.SAME | Moves.ORDERED)


def _view() -> Rule:
    return linear(_reshape, Samples.RESHAPE, moves=Moves.SAME | Moves.ORDERED | Moves.VIEW)


def _identity() -> Rule:
    """An op of ours that taps a tensor."""
    return linear(_reshape, Samples.ELEMENTWISE, lambda c, inputs: inputs[0], moves=Moves.SAME | Moves.ORDERED)


_VIEWS = ("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "_reshape_alias")

TABLE: dict[str, Rule] = {
    **{f"aten.{name}.default": _view() for name in _VIEWS},
    "aten.squeeze.dim": _view(),
    "aten.squeeze.dims": _view(),
    "aten.clone.default": _copy(),
    "aten.alias.default": _copy(),
    "aten.lift_fresh_copy.default": linear(_reshape, Samples.ELEMENTWISE),
    "aten.permute.default": linear(_permute, Samples.PERMUTE, moves=Moves.VIEW),
    "aten.transpose.int": linear(
        lambda c, g, slot: g.transpose(c.argument(1), c.argument(2)), Samples.TRANSPOSE, moves=Moves.VIEW
    ),
    "aten.t.default": linear(lambda c, g, slot: g.t(), Samples.TRANSPOSE, moves=Moves.VIEW),
    "aten.expand.default": linear(_expand, Samples.EXPAND, moves=Moves.SAME | Moves.VIEW),
    "aten.repeat.default": linear(_repeat, Samples.REPEAT),
    "aten.slice.Tensor": selection(Samples.SLICE, Moves.SAME | Moves.VIEW),
    "aten.select.int": selection(Samples.SELECT),
    "aten.cat.default": linear(_cat, Samples.CAT, moves=Moves.SAME),
    "aten.stack.default": linear(_stack, Samples.STACK),
    "aten.flip.default": linear(_flip, Samples.FLIP),
    "aten.roll.default": linear(_roll, Samples.ROLL),
    "aten.constant_pad_nd.default": linear(_pad, Samples.PAD, _pad_forward),
    **{
        f"aten.{mode}_pad{n}d.default": _padding_backward(f"{mode}_pad{n}d")
        for mode in ("reflection", "replication")
        for n in (1, 2, 3)
    },
    "aten._to_copy.default": linear(_cast, Samples.ELEMENTWISE),
    "aten.diagonal.default": linear(_diagonal, Samples.INDEX, moves=Moves.VIEW),
    "aten.diagonal_scatter.default": linear(_diagonal_scatter, Samples.UNKNOWN),
    "aten.unfold.default": linear(_unfold, Samples.UNFOLD, moves=Moves.VIEW),
    "aten.tril.default": linear(_same_op, Samples.ELEMENTWISE),
    "aten.triu.default": linear(_same_op, Samples.ELEMENTWISE),
    "aten.sum.default": linear(_sum, Samples.SUM),
    "aten.sum.dim_IntList": linear(_sum, Samples.SUM),
    "aten.mean.default": linear(_mean, Samples.SUM),
    "aten.mean.dim": linear(_mean, Samples.SUM),
    "aten.cumsum.default": linear(_cumsum, Samples.SEQUENCE),
    "aten.avg_pool2d.default": _pool(aten.avg_pool2d_backward, _AVERAGE),
    "aten.avg_pool3d.default": _pool(aten.avg_pool3d_backward, _AVERAGE),
    "aten._adaptive_avg_pool2d.default": _pool(aten._adaptive_avg_pool2d_backward, []),
    "aten._adaptive_avg_pool3d.default": _pool(aten._adaptive_avg_pool3d_backward, []),
    **{f"aten.upsample_nearest{n}d.default": _resample(f"upsample_nearest{n}d", n) for n in (1, 2, 3)},
    **{f"aten._upsample_nearest_exact{n}d.default": _resample(f"_upsample_nearest_exact{n}d", n) for n in (1, 2, 3)},
    "aten.upsample_linear1d.default": _resample("upsample_linear1d", 2),
    "aten.upsample_bilinear2d.default": _resample("upsample_bilinear2d", 3),
    "aten.upsample_bicubic2d.default": _resample("upsample_bicubic2d", 3),
    "aten.upsample_trilinear3d.default": _resample("upsample_trilinear3d", 4),
    "aten.im2col.default": linear(_im2col, Samples.LEADING),
    "aten.col2im.default": linear(_col2im, Samples.LEADING),
    "dag_hesse.tap.default": _identity(),
    "dag_hesse.assigned.default": replace(_identity(), moves=NOTHING, samples=Samples.UNKNOWN),
}

__all__ = ["TABLE", "axes"]
