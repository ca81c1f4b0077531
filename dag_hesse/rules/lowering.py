"""Ops rewritten into ops that have a rule, while the model is recorded.

Order of precedence: an op listed here (or in ``CONCRETE``, where the lowering must see the values of integer tensors)
is rewritten as given, unless its lowering returns ``NotImplemented``; an op with a rule stays whole; one with a
decomposition in torch is rewritten by it; anything else stays and becomes OPAQUE.

Lowerings see tensors without values: they ask for shapes, dtypes and plain arguments only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

from dag_hesse.ir.ops import batch_affine, standardize
from dag_hesse.rules import backward, distances, losses
from dag_hesse.rules.concrete import CONCRETE
from dag_hesse.rules.distances import rooted
from dag_hesse.rules.structural import axes
from dag_hesse.rules.table import RULES

aten = torch.ops.aten


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _channels(x: Tensor) -> list[int]:
    return [1, -1, *[1] * (x.ndim - 2)]


def _statistics(x: Tensor, dims: list[int], eps: float, center: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation, which a backward pass recorded in a forward uses; else nobody uses them."""
    mean = x.mean(dims, keepdim=True)
    off = x - mean if center else x
    return mean, ((off * off).mean(dims, keepdim=True) + eps).rsqrt()


def _layer_norm(x: Tensor, shape: list[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    dims = list(range(-len(shape), 0))
    return _affine(standardize(x, dims, eps, True), weight, bias, list(shape)), *_statistics(x, dims, eps)


def _group_norm(
    x: Tensor, weight: Any, bias: Any, n: int, c: int, cells: int, groups: int, eps: float
) -> tuple[Tensor, ...]:
    rows = x.reshape(n, groups, -1)
    y = _affine(standardize(rows, [2], eps, True).reshape(x.shape), weight, bias, _channels(x))
    mean, rstd = _statistics(rows, [2], eps)
    return y, mean.squeeze(2), rstd.squeeze(2)


def _rms_norm(x: Tensor, shape: list[int], weight: Any, eps: float | None) -> tuple[Tensor, ...]:
    eps, dims = torch.finfo(x.dtype).eps if eps is None else eps, list(range(-len(shape), 0))
    y = _affine(standardize(x, dims, eps, False), weight, None, list(shape))
    return y, _statistics(x, dims, eps, center=False)[1]


def _batch_norm(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    outputs: int = 3,
) -> tuple[Tensor, ...]:
    shape, dims = _channels(x), [0, *range(2, x.ndim)]
    none = x.new_zeros(0)
    if training or mean is None:
        y = _affine(standardize(x, dims, eps, True), weight, bias, shape)
        saved = tuple(s.reshape(-1) for s in _statistics(x, dims, eps))
    else:
        y, saved = batch_affine(x, weight, bias, mean, var, eps), (none, none)
    return (y, *saved, none)[:outputs]


def _batch_norm_no_stats(x: Tensor, weight: Any, bias: Any, training: bool, momentum: float, eps: float) -> Any:
    return _batch_norm(x, weight, bias, None, None, training, momentum, eps)


def _cudnn_batch_norm(
    x: Tensor, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    return _batch_norm(x, w, b, mean, var, training, momentum, eps, outputs=4)


def _batch_norm_with_update(x: Tensor, w: Any, b: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    return _batch_norm(x, w, b, mean, var, True, momentum, eps, outputs=4)


def _batch_norm_no_update(x: Tensor, w: Any, b: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    return _batch_norm(x, w, b, mean, var, False, momentum, eps, outputs=4)


def _scaled(x: Tensor, factor: Any) -> Tensor:
    return x if factor == 1 else x * factor


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = _scaled(a @ b if a.ndim == 2 else torch.bmm(a, b), alpha)
    return product if beta == 0 else product + _scaled(bias, beta)


def _addbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _scaled(torch.bmm(a, b).sum(0), alpha) + _scaled(bias, beta)


def _mv(a: Tensor, x: Tensor) -> Tensor:
    return torch.mm(a, x.unsqueeze(1)).squeeze(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def _addmv(bias: Tensor, a: Tensor, x: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return _scaled(_mv(a, x), alpha) + _scaled(bias, beta)


def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, e1: list[int], e2: list[int], e3: list[int], sums: list[int], unroll: int = 1
) -> Tensor:
    for axis in sorted(e1):
        a = a.unsqueeze(axis)
    for axis in sorted(e2):
        b = b.unsqueeze(axis)
    for axis in sorted(e3):
        c = c.unsqueeze(axis)
    return (a * b * c).sum(sums)


def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    total = x.shape[dim]
    return [x.narrow(dim, start, min(size, total - start)) for start in range(0, total, size)] or [x]


def _split_sizes(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    return [x.narrow(dim, sum(sizes[:k]), size) for k, size in enumerate(sizes)]


def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [x.select(dim, k) for k in range(x.shape[dim])]


def _var(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    dims = axes(dim, x.ndim)
    centered = x - x.mean(dims, keepdim=True)
    count = prod(x.shape[d] for d in dims) - (1 if correction is None else correction)
    return (centered * centered).sum(dims, keepdim=keepdim) / max(count, 0)


def _std(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    return rooted(_var(x, dim, correction=correction, keepdim=keepdim))


def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _var(x, dim, correction=correction, keepdim=keepdim), x.mean(axes(dim, x.ndim), keepdim=keepdim)


def _std_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    variance, mean = _var_mean(x, dim, correction=correction, keepdim=keepdim)
    return rooted(variance), mean


def _copy(into: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
    return x.to(dtype=into.dtype, device=into.device).expand(into.shape).clone()


def _max_pool1d(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Tensor:
    def wide(value: Any, neutral: int) -> list[int]:
        return [neutral, *([value] if isinstance(value, int) else value)]

    size = wide(kernel, 1)
    step = wide(stride, 1) if stride else size
    lifted = x.unsqueeze(-2)
    return aten.max_pool2d_with_indices(lifted, size, step, wide(padding, 0), wide(dilation, 1), ceil)[0].squeeze(-2)


def _scan(join: Callable[[Tensor, Tensor], Tensor], neutral: float) -> Callable[..., Any]:
    """An associative op along an axis by doubling: of 2, 4, 8, … elements. PyTorch's own second derivatives cancel."""

    def written(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
        x = x if dtype is None else x.to(dtype)
        if not x.is_floating_point():
            return NotImplemented
        count, step = x.shape[dim] if x.ndim else 1, 1
        if count < 2:
            return x.clone()
        while step < count:
            none = torch.full_like(x.narrow(dim, 0, step), neutral)
            x = join(x, torch.cat([none, x.narrow(dim, 0, count - step)], dim))
            step *= 2
        return x

    return written


def _fill_diagonal(x: Tensor, value: float, wrap: bool = False) -> Tensor:
    """The tensor with its diagonal replaced; with ``wrap``, a tall matrix has one again below each."""
    if x.ndim > 2:
        places = torch.arange(x.shape[0], device=x.device)
        return aten.index_put(x, [places] * x.ndim, x.new_full((), value))
    rows, columns = x.shape
    step, count = columns + 1, rows * columns if wrap else min(rows, columns) * (columns + 1)
    places = torch.arange(0, min(count, rows * columns), step, device=x.device)
    return aten.index_put(x.reshape(-1), [places], x.new_full((), value)).reshape(x.shape)


def _as_strided_scatter(
    x: Tensor, source: Tensor, size: list[int], stride: list[int], offset: int | None = None
) -> Any:
    """Elements of a contiguous tensor replaced by their place in memory; PyTorch's own backward of it is wrong."""
    if not x.is_contiguous():
        return NotImplemented
    places = torch.full([1] * len(size), offset or 0, device=x.device)
    for axis, (count, step) in enumerate(zip(size, stride, strict=True)):
        lies = [-1 if k == axis else 1 for k in range(len(size))]
        places = places + torch.arange(count, device=x.device).reshape(lies) * step
    flat = aten.index_put(x.reshape(-1), [places.reshape(-1)], source.reshape(-1))
    return flat.reshape(x.shape)


def _div(x: Tensor, y: Any, *, rounding_mode: str | None) -> Any:
    return x / y if rounding_mode is None else NotImplemented


def _gates(x: Tensor, bias: Tensor | None, count: int) -> list[Tensor]:
    size = x.shape[1] // count
    x = x if bias is None else x + bias
    return [x.narrow(1, k * size, size) for k in range(count)]


def _lstm_cell(
    inputs: Tensor, hidden: Tensor, cell: Tensor, input_bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    both = inputs + hidden if input_bias is None else inputs + input_bias + hidden
    i, f, g, o = _gates(both, hidden_bias, 4)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell, both


def _gru_cell(
    inputs: Tensor, hidden: Tensor, state: Tensor, input_bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    of_input, of_state = _gates(inputs, input_bias, 3), _gates(hidden, hidden_bias, 3)
    reset, update = ((a + b).sigmoid() for a, b in zip(of_input[:2], of_state[:2], strict=True))
    new = (of_input[2] + reset * of_state[2]).tanh()
    return new + update * (state - new), inputs


LOWERINGS: Mapping[Any, Callable[..., Any]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten._fused_rms_norm.default: _rms_norm,
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit.default: _batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_no_stats,
    aten._native_batch_norm_legit_no_training.default: (
        lambda x, w, b, mean, var, momentum, eps: _batch_norm(x, w, b, mean, var, False, momentum, eps)
    ),
    aten._batch_norm_with_update.default: _batch_norm_with_update,
    aten._batch_norm_no_update.default: _batch_norm_no_update,
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    aten.copy.default: _copy,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.addbmm.default: _addbmm,
    aten.addmv.default: _addmv,
    aten.mv.default: _mv,
    aten.dot.default: _dot,
    aten._trilinear.default: _trilinear,
    aten.split.Tensor: _split,
    aten.unsafe_split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.unsafe_split_with_sizes.default: _split_sizes,
    aten.unbind.int: _unbind,
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.var_mean.correction: _var_mean,
    aten.std_mean.correction: _std_mean,
    aten.max_pool1d.default: _max_pool1d,
    aten.as_strided_scatter.default: _as_strided_scatter,
    aten.logcumsumexp.default: _scan(lambda x, y: torch.logsumexp(torch.stack([x, y], -1), -1), -torch.inf),
    aten.cumprod.default: _scan(torch.mul, 1.0),
    aten.fill_diagonal_.default: _fill_diagonal,
    aten.div.Tensor_mode: _div,
    aten.div.Scalar_mode: _div,
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_gru_cell.default: _gru_cell,
    **losses.LOWERINGS,
    **distances.LOWERINGS,
    **backward.LOWERINGS,
}

# Torch's own decompositions that would hide something from us (a custom kernel is kept, a detach is seen).
_KEEP = {"aten.detach.default", "aten.bernoulli.default"}


def _with_long_labels(written: Callable[..., Any]) -> Callable[..., Any]:
    """A loss whose labels may be bytes, which index nothing."""
    return lambda x, labels, *rest: written(x, labels.long(), *rest)


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the decomposition table that capture hands to the tracer."""
    theirs = {
        op: fn
        for op, fn in core_aten_decompositions().items()
        if str(op) not in RULES and str(op) not in _KEEP and not str(op).split(".")[1].endswith("_")
    }
    labelled = (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
    return {**theirs, **{op: _with_long_labels(theirs[op]) for op in labelled}, **LOWERINGS}


__all__ = ["CONCRETE", "LOWERINGS", "decompositions"]
