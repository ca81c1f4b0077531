"""Steps that draw random numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.property.steps.parts import WIDTH


def noise(m: Any, x: Tensor) -> Tensor:
    return x * torch.rand_like(x) + 0.1 * torch.randn(WIDTH).to(x)


def bernoulli(m: Any, x: Tensor) -> Tensor:
    return x * torch.empty_like(x).bernoulli_(0.7) + torch.bernoulli(x.detach().sigmoid()) * 0.3


def reparametrized(m: Any, x: Tensor) -> Tensor:
    return torch.distributions.Normal(x, F.softplus(x)).rsample()


def shuffled(m: Any, x: Tensor) -> Tensor:
    return x[torch.randperm(len(x))] + 0.5 * x


def dropout_unused(m: Any, x: Tensor) -> Tensor:
    F.dropout(x, 0.5)
    return F.dropout(x, 0.3, inplace=False) + torch.rand(()).to(x)


def sampled(m: Any, x: Tensor) -> Tensor:
    return x + m.table(torch.multinomial(torch.softmax(x.detach(), -1), 1).squeeze(1))
