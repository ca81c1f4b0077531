"""Steps that differentiate inside, and transforms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def with_grad(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.clone().requires_grad_()


def derivative(m: Any, x: Tensor) -> Tensor:
    x = with_grad(x)
    (g,) = torch.autograd.grad(m.inner(x).tanh().sum(), x, create_graph=True)
    return g * x


def inner_step(m: Any, x: Tensor) -> Tensor:
    w = m.inner.weight
    (g,) = torch.autograd.grad((x @ w).square().mean(), w, create_graph=True)
    return x @ (w - 0.3 * g)


def first_order_step(m: Any, x: Tensor) -> Tensor:
    x = with_grad(x)
    (g,) = torch.autograd.grad((x * x.sin()).sum(), x, retain_graph=True)
    return x - 0.3 * g


def functional(m: Any, x: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(lambda t: F.silu(m.inner(t)).sum()))(x)


def pushed(m: Any, x: Tensor) -> Tensor:
    return torch.func.jvp(lambda t: m.inner(t).tanh(), (x,), (x.sin(),))[1]


def vmapped(m: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda row, scale: torch.outer(row, row.sin()).sum(0) * scale, (0, None))(x, m.scale)


def checkpointed(m: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda t: m.inner(t).cos(), x, use_reentrant=False)
