"""Models and batches of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag_hesse.experiments.models import mlp, resnet18, resnet50


@dataclass(frozen=True)
class Workload:
    """A model with its batch, and cross-entropy as the loss."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self, output: Tensor) -> Tensor:
        """The loss of an output."""
        return F.cross_entropy(output, self.y)

    def value(self) -> Tensor:
        """The loss."""
        return self.loss(self.model(self.x))

    def gradient(self) -> tuple[Tensor, ...]:
        """Of the loss by all parameters."""
        return torch.autograd.grad(self.value(), list(self.model.parameters()))

    def functional(self, params: dict[str, Tensor]) -> Tensor:
        """The loss as a function of the parameters."""
        return self.loss(torch.func.functional_call(self.model, params, (self.x,)))


class VisionTransformer(nn.Module):
    """A ViT's shape, ViT-Tiny's by default: 12 blocks on patches of 16."""

    def __init__(self, width: int = 192, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.position = nn.Parameter(torch.randn(1, 196, width) * 0.02)
        block = partial(
            nn.TransformerEncoderLayer, width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.ModuleList(block() for _ in range(12))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class LanguageModel(nn.Module):
    """GPT-2 from ``transformers``: logits of the next token only, (batch · tokens, vocabulary)."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.body = GPT2LMHeadModel(GPT2Config(**sizes))

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(ids).logits.flatten(0, 1)


def _images(model: nn.Module, batch: int, side: int, classes: int) -> Workload:
    x = torch.randn(batch, 3, side, side)
    # BatchNorm knows the batch, as after training. With its initial statistics ResNet-50's logits grow so large that
    # the softmax saturates, and Gauss–Newton products in float32 have four digits, whoever computes them.
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return Workload(model.eval(), x, torch.arange(batch) % classes)


def _mlp(batch: int = 256) -> Workload:
    return Workload(mlp([3072, *[1024] * 16, 10], nn.SiLU), torch.randn(batch, 3072), torch.arange(batch) % 10)


def _gpt(batch: int, tokens: int, **sizes: int) -> Workload:
    model = LanguageModel(**sizes).eval()
    ids = torch.randint(0, model.body.config.vocab_size, (batch, tokens))
    return Workload(model, ids, ids.roll(-1, 1).flatten())


_SMALL = {
    "n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 5000, "n_positions": 128, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
WORKLOADS: dict[str, Callable[[], Workload]] = {
    "MLP 3072-1024×16-10, B=256": _mlp,
    "ResNet-18 SiLU, B=32, 32²": lambda: _images(resnet18(activation=nn.SiLU), 32, 32, 10),
    "ResNet-18 ReLU, B=32, 32²": lambda: _images(resnet18(), 32, 32, 10),
    "ResNet-50, B=8, 64²": lambda: _images(resnet50(), 8, 64, 1000),
    "ResNet-50, B=8, 224²": lambda: _images(resnet50(), 8, 224, 1000),
    "ViT-Tiny, B=16, 224²": lambda: _images(VisionTransformer(), 16, 224, 1000),
    "GPT-2 4×256, B=4, S=128": lambda: _gpt(4, 128, **_SMALL),
}
# Of the size that a GPU is for.
LARGE: dict[str, Callable[[], Workload]] = {
    "ResNet-50, B=64, 224²": lambda: _images(resnet50(), 64, 224, 1000),
    "GPT-2 124M, B=4, S=1024": lambda: _gpt(4, 1024),
    "ViT-B/16, B=32, 224²": lambda: _images(VisionTransformer(768, 12), 32, 224, 1000),
    "MLP 3072-1024×16-10, B=8192": lambda: _mlp(8192),
}
