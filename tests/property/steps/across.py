"""Steps that write to what they are given, where other steps see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows_written(m: Any, x: Tensor) -> Tensor:
    x[:, 1:].mul_(0.7)
    return x


def returns_a_view(m: Any, x: Tensor) -> Tensor:
    x.t()[0].add_(0.3)
    return x.t().t()


def sees_itself(m: Any, x: Tensor) -> Tensor:
    other = x.view(-1)
    x += 0.2
    return other.view_as(x) + x[:, :1]


def added_below(m: Any, x: Tensor, y: Tensor) -> Tensor:
    x.add_(y, alpha=0.5)
    return x


def unseen(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x[:, 0] += 0.2
    return x


def stored(m: Any, x: Tensor) -> Tensor:
    m.calls.append(x[:, 1:])
    if len(m.calls) > 1:
        m.calls[-2].add_(0.1)
    return x
