"""What steps may use: a model's parts, and functions of the user's with derivatives of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 3
Step = Callable[..., Tensor]


class Parts(nn.Module):
    """What steps may use: buffers, parameters that some write to, small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.masked, self.moved = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 1, dropout=0.2, batch_first=True)
        self.norm = nn.BatchNorm1d(WIDTH, eps=1e-1)
        self.table = nn.Embedding(4, WIDTH)
        self.register_buffer("count", torch.tensor(1.0))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.register_buffer("mask", torch.tril(torch.ones(WIDTH, WIDTH)))
        self.calls: list[Tensor] = []
        self.touched: set[str] = set()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * ctx.factor * g * x**2, None


class Pair(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin() * y, (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        x, y = ctx.saved_tensors
        return g * x.cos() * y, g * x.sin()


class Surrogate(torch.autograd.Function):
    """A step forward, a sigmoid's slope backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s * (1 - s)
