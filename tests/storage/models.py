"""Six small models in float64 with their points, and the truth about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from tests.oracle import Truth

BATCH, CLASSES = 3, 4


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.act, self.head = (
            nn.Linear(5, 36),
            nn.Linear(36, 36),
            nn.SiLU(),
            nn.Linear(36, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.head(x + self.act(self.inner(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(5, 10), nn.Linear(10, 30), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x)).chunk(3, dim=-1)
        return self.head((torch.softmax(q @ k.mT / 3, dim=-1) @ v).mean(1))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.head = nn.Linear(5, 40), nn.Linear(40, 40), nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.head(x * torch.tanh(self.gate(x)))


def _mlp(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 40), act(), nn.Linear(40, 36), act(), nn.Linear(36, CLASSES))


def _cnn() -> nn.Module:
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, CLASSES))
    model[1].running_mean.normal_()
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A model, the shape of its inputs, and its points in activation and parameter space."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    activations: tuple[str, ...]
    parameters: tuple[str, ...]


CASES = {
    "tanh": Case(lambda: _mlp(nn.Tanh), (5,), ("0", "2", "3"), ("0.bias", "2.bias", "4.weight")),
    "relu": Case(lambda: _mlp(nn.ReLU), (5,), ("0", "1", "3"), ("0.bias", "2.bias", "4.weight")),
    "cnn": Case(_cnn, (1, 5, 5), ("1", "3"), ("0.weight", "1.weight", "3.weight", "6.weight")),
    "residual": Case(Residual, (5,), ("stem", "inner"), ("stem.weight", "inner.bias", "head.weight")),
    "attention": Case(Attention, (4, 5), ("embed", "qkv"), ("embed.weight", "qkv.bias", "head.weight")),
    "gate": Case(Gate, (5,), ("inner", "gate"), ("inner.bias", "gate.bias", "head.weight")),
}


@cache
def made(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model and its batch."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = CASES[name].make().double()
        return model, (torch.randn(BATCH, *CASES[name].shape, dtype=torch.float64), torch.arange(BATCH) % CLASSES)


@cache
def truth(name: str) -> Truth:
    """Its blocks by the oracle."""
    case, (model, (x, y)) = CASES[name], made(name)
    return Truth(model, lambda: F.cross_entropy(model(x), y), case.activations, case.parameters)


def points(name: str, space: str) -> tuple[str, ...]:
    """Names of the points."""
    return CASES[name].activations if space == "activation" else CASES[name].parameters


def dense(name: str, space: str, mode: str = "shared", part: str = "full") -> Tensor:
    """The whole matrix by the oracle; points are in topological order."""
    own = points(name, space)
    return torch.cat([torch.cat([truth(name).block(v, w, part, mode) for w in own], dim=1) for v in own])


def stored(name: str, space: str = "activation", mode: str = "shared", **options: Any) -> dh.BlockMatrix:
    """Our blocks."""
    model, batch = made(name)
    return dh.BlockMatrix.from_model(
        model, batch, points=list(points(name, space)), space=space, batch_mode=mode, **options
    )
