"""Losses written as ops that have rules, with the derivatives of their closed forms wherever those exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dag_hesse.rules.special import clamped_log

aten = torch.ops.aten


def reduced(x: Tensor, reduction: int) -> Tensor:
    """As it is, its mean, or its sum."""
    return x if reduction == 0 else x.mean() if reduction == 1 else x.sum()


def _huber_of(off: Tensor, delta: float) -> Tensor:
    """½ d² within δ, linear outside, by d clamped to ±δ: curvature 1 within, at 0 too, and 0 at ±δ as in autograd."""
    near = torch.nn.functional.hardtanh(off, -delta, delta)
    return near * (off - near * 0.5)


def _huber(x: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    return reduced(_huber_of(x - target, delta), reduction)


def _smooth_l1(x: Tensor, target: Tensor, reduction: int = 1, beta: float = 1.0) -> Tensor:
    off = x - target
    return reduced(off.abs() if beta == 0 else _huber_of(off, beta) / beta, reduction)


def _binary_cross_entropy(p: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Tensor:
    found = -(target * clamped_log(p) + (1 - target) * clamped_log(1 - p))
    return reduced(found if weight is None else found * weight, reduction)


def _soft_margin(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return reduced(-aten.log_sigmoid_forward.default(x * target)[0], reduction)


def _multi_margin(
    x: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """Mean over the other classes of max(0, margin − x_y + x_i)^p."""
    rows, labels = (x, target.reshape(-1)) if x.ndim == 2 else (x.unsqueeze(0), target.reshape(-1))
    labels = labels.unsqueeze(1)
    short = (margin - rows.gather(1, labels) + rows).relu()
    short = short if p == 1 else short * short
    if weight is not None:
        short = short * weight.index_select(0, labels.reshape(-1)).unsqueeze(1)
    others = torch.ones_like(rows, dtype=torch.bool).scatter(1, labels, False)
    found = short.masked_fill(~others, 0.0).sum(1) / rows.shape[1]
    return reduced(found if x.ndim == 2 else found.squeeze(0), reduction)


def _multilabel_margin(x: Tensor, target: Tensor, reduction: int = 1) -> tuple[Tensor, Tensor]:
    """Σ max(0, 1 − x_y + x_i) / classes, over labels y (those before the first −1) and all other classes i."""
    rows, labels = (x, target) if x.ndim == 2 else (x.unsqueeze(0), target.unsqueeze(0))
    valid, labels = (labels < 0).cumsum(1) == 0, labels.clamp(min=0)
    marked = torch.zeros_like(labels).scatter_add(1, labels, valid.to(labels.dtype)) > 0
    short = (1 - rows.gather(1, labels).unsqueeze(2) + rows.unsqueeze(1)).relu()
    counted = valid.unsqueeze(2) & ~marked.unsqueeze(1)
    found = short.masked_fill(~counted, 0.0).sum([1, 2]) / rows.shape[1]
    return reduced(found if x.ndim == 2 else found.squeeze(0), reduction), marked.to(x.dtype).reshape(x.shape)


LOWERINGS: Mapping[Any, Callable[..., Any]] = {
    aten.huber_loss.default: _huber,
    aten.smooth_l1_loss.default: _smooth_l1,
    aten.binary_cross_entropy.default: _binary_cross_entropy,
    aten.soft_margin_loss.default: _soft_margin,
    aten.multi_margin_loss.default: _multi_margin,
    aten.multilabel_margin_loss_forward.default: _multilabel_margin,
}

__all__ = ["LOWERINGS", "reduced"]
