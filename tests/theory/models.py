"""Small float64 models for the paper's statements, and dense Jacobians by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import Truth

BATCH, CLASSES = 3, 3
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """x + act(linear(x))."""

    def __init__(self, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(width, width), act()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.linear(x))


def chain(act: type[nn.Module] = nn.Tanh, depth: int = 3, width: int = 4) -> nn.Sequential:
    """Linear layers and activations; activations are the odd places."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), act()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)).double()


def residual(act: type[nn.Module] = nn.Tanh, depth: int = 2, width: int = 4) -> nn.Sequential:
    """Blocks with a skip connection, at places 0 … depth − 1, and a head."""
    return nn.Sequential(*(Block(width, act) for _ in range(depth)), nn.Linear(width, CLASSES)).double()


def batch(width: int = 4, samples: int = BATCH, seed: int = 3) -> Batch:
    """Normal inputs and labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    return x, torch.arange(samples) % CLASSES


def truth(model: nn.Module, data: Batch, names: Sequence[str]) -> Truth:
    """The oracle's blocks under the mean cross-entropy."""
    x, y = data
    return Truth(model, lambda: F.cross_entropy(model(x), y), names)


def jacobians(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d run(x)/dx of every sample, (B, d_out, d_in)."""
    return torch.stack([torch.autograd.functional.jacobian(lambda z: run(z[None])[0], sample) for sample in x])
