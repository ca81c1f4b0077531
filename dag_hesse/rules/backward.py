"""Ops of a backward pass, which a forward records that differentiates something itself (a gradient penalty, forces)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _elu(g: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor) -> Tensor:
    """``x`` is the input of the forward pass, or its result."""
    negative = alpha * scale
    slope = (x + negative) * input_scale if is_result else (x * input_scale).exp() * (negative * input_scale)
    return torch.where(x <= 0, g * slope, g * scale)


def _softplus(g: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    scaled = x * beta
    return torch.where(scaled > threshold, g, g * scaled.sigmoid())


def _shrink(g: Tensor, x: Tensor, limit: float) -> Tensor:
    return g.masked_fill(x.abs() <= limit, 0.0)


def _log_sigmoid(g: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    return g * (-x).sigmoid()


def _hardsigmoid(g: Tensor, x: Tensor) -> Tensor:
    return (g / 6).masked_fill((x <= -3) | (x >= 3), 0.0)


def _huber(g: Tensor, x: Tensor, target: Tensor, reduction: int, delta: float) -> Tensor:
    near = torch.nn.functional.hardtanh(x - target, -delta, delta)
    return g * near / (x.numel() if reduction == 1 else 1)


def _smooth_l1(g: Tensor, x: Tensor, target: Tensor, reduction: int, beta: float) -> Tensor:
    if beta == 0:
        return g * (x - target).sign() / (x.numel() if reduction == 1 else 1)
    return _huber(g, x, target, reduction, beta) / beta


def _standardized(x: Tensor, dims: list[int], rstd: Tensor, center: bool = True) -> tuple[Tensor, Tensor]:
    """(x − m) r and r as functions of x alone, which is how autograd differentiates a norm's backward.

    The ε that r was made with is what r has over the variance.
    """
    off = x - x.mean(dims, keepdim=True) if center else x
    var = (off * off).mean(dims, keepdim=True)
    r = (var + (rstd.detach() ** -2 - var.detach())).rsqrt()
    return off * r, r


def _projected(g: Tensor, y: Tensor, r: Tensor, dims: list[int], center: bool = True) -> Tensor:
    """The gradient in x, from that in y = (x − m) r."""
    off = g - g.mean(dims, keepdim=True) if center else g
    return (off - y * (g * y).mean(dims, keepdim=True)) * r


def _scaled(g: Tensor, weight: Tensor | None, shape: list[int]) -> Tensor:
    return g if weight is None else g * weight.reshape(shape)


def _rms_norm(
    g: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    dims = list(range(-len(shape), 0))
    y, r = _standardized(x, dims, rstd, center=False)
    to_x = _projected(_scaled(g, weight, shape), y, r, dims, center=False) if mask[0] else None
    return to_x, (g * y).reshape(-1, *shape).sum(0) if mask[1] and weight is not None else None


def _layer_norm(
    g: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    dims = list(range(-len(shape), 0))
    y, r = _standardized(x, dims, rstd)
    to_x = _projected(_scaled(g, weight, shape), y, r, dims) if mask[0] else None
    to_weight = (g * y).reshape(-1, *shape).sum(0) if mask[1] and weight is not None else None
    return to_x, to_weight, g.reshape(-1, *shape).sum(0) if mask[2] and bias is not None else None


def _group_norm(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    cells: int,
    groups: int,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    split, dims = [n, groups, c // groups, cells], [2, 3]
    y, r = _standardized(x.reshape(split), dims, rstd.reshape(n, groups, 1, 1))
    g = g.reshape(split)
    to_x = _projected(_scaled(g, weight, [1, groups, -1, 1]), y, r, dims).reshape(x.shape) if mask[0] else None
    to_weight = (g * y).sum([0, 3]).reshape(c) if mask[1] else None
    return to_x, to_weight, g.sum([0, 3]).reshape(c) if mask[2] else None


def _batch_norm(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    save_mean: Tensor | None,
    save_rstd: Tensor | None,
    train: bool,
    eps: float,
    mask: list[bool],
) -> tuple[Tensor | None, ...]:
    shape, dims = [1, -1, *[1] * (x.ndim - 2)], [0, *range(2, x.ndim)]
    scaled = _scaled(g, weight, shape)
    if train:
        assert save_rstd is not None
        y, r = _standardized(x, dims, save_rstd.reshape(shape))
        to_x = _projected(scaled, y, r, dims)
    else:
        assert mean is not None and var is not None
        r = (var.reshape(shape) + eps).rsqrt()
        y, to_x = (x - mean.reshape(shape)) * r, scaled * r
    return to_x, (g * y).sum(dims) if mask[1] else None, g.sum(dims) if mask[2] else None


def _unified_batch_norm(*arguments: Any) -> tuple[Tensor | None, ...]:
    return _batch_norm(*arguments[:-1])  # the last one is what a vendor's kernel keeps


def _rrelu(g: Tensor, x: Tensor, noise: Tensor, lower: float, upper: float, training: bool, is_result: bool) -> Tensor:
    """``noise`` holds the slopes that were drawn, 1 where x > 0."""
    if training and upper - lower > 1e-6:
        return g * noise
    return torch.where(x > 0, g, g * ((lower + upper) / 2))


LOWERINGS: Mapping[Any, Callable[..., Any]] = {
    aten.elu_backward.default: _elu,
    aten.softplus_backward.default: _softplus,
    aten.softshrink_backward.default: _shrink,
    aten.hardshrink_backward.default: _shrink,
    aten.log_sigmoid_backward.default: _log_sigmoid,
    aten.hardsigmoid_backward.default: _hardsigmoid,
    aten.huber_loss_backward.default: _huber,
    aten.smooth_l1_loss_backward.default: _smooth_l1,
    aten._fused_rms_norm_backward.default: _rms_norm,
    aten.native_layer_norm_backward.default: _layer_norm,
    aten.native_group_norm_backward.default: _group_norm,
    aten.native_batch_norm_backward.default: _batch_norm,
    aten.batch_norm_backward.default: _unified_batch_norm,
    aten.rrelu_with_noise_backward.default: _rrelu,
}

__all__ = ["LOWERINGS"]
