"""Models, a training loop, and curvature by dense double-backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import Truth

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """BatchNorm, dropout and three blocks; in training mode unless told otherwise."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.body = nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 4), nn.SiLU())
        self.head = nn.Linear(4, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net(dtype)


def data(count: int = 12, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, generator=generator, dtype=dtype), torch.arange(count) % 3


def train_step(model: nn.Module, optimizer: Any, batch: Batch) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def truth(
    model: nn.Module, batch: Batch, parameters: list[str] | None = None, points: list[str] | None = None
) -> Truth:
    """Of a copy in evaluation mode."""
    model = copy.deepcopy(model).eval()
    names = [n for n, _ in model.named_parameters()] if parameters is None else parameters
    run: Callable[[], Tensor] = lambda: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    return Truth(model, run, points or [], names)


def matrix(found: Truth, names: list[str], part: str = "full") -> Tensor:
    """The whole matrix over some parameters."""
    return torch.cat([torch.cat([found.block(v, w, part, "joint") for w in names], 1) for v in names])


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def top(h: Tensor) -> float:
    return float(torch.linalg.eigvalsh(h)[-1])


def state_of(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Everything that training has made."""
    moments = [x for p in optimizer.state.values() for x in p.values() if isinstance(x, Tensor)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.state_dict().values(), *grads, *moments, torch.get_rng_state()]
