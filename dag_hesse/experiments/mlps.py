"""The paper's fully connected networks (§5, common protocol), with PyTorch's default initialization.

A projection block takes the flattened image to the network's width; the outputs of the blocks after it are the points,
and a linear head follows. The text says He initialization; the published figures are those of the default one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}
INPUTS = 3 * 32 * 32


class Block(nn.Module):
    """Linear, LayerNorm where asked for, activation."""

    def __init__(
        self, inputs: int, outputs: int, activation: str = "relu", norm: bool = True, spectral: bool = False
    ) -> None:
        super().__init__()
        linear = nn.Linear(inputs, outputs)
        self.linear = spectral_norm(linear) if spectral else linear
        self.norm = nn.LayerNorm(outputs) if norm else nn.Identity()
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.linear(x)))


class ResidualBlock(nn.Module):
    """x + α σ(Wx + b), without LayerNorm."""

    def __init__(self, width: int, alpha: float, activation: str = "relu") -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.act = ACTIVATIONS[activation]()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.act(self.linear(x))


class Chain(nn.Module):
    """Flatten, projection, blocks, head."""

    def __init__(self, projection: nn.Module, blocks: Iterable[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.projection, self.blocks, self.head = projection, nn.ModuleList(blocks), head

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain_mlp(
    depth: int,
    width: int = 64,
    classes: int = 10,
    activation: str = "relu",
    norm: bool = True,
    spectral: bool = False,
    inputs: int = INPUTS,
) -> Chain:
    """Experiments 1, 1b and 3: a chain of ``depth`` equal blocks."""
    sizes = [inputs, *[width] * (depth + 1)]
    projection, *blocks = [Block(a, b, activation, norm, spectral) for a, b in itertools.pairwise(sizes)]
    return Chain(projection, blocks, nn.Linear(width, classes))


def residual_mlp(
    depth: int, width: int = 64, classes: int = 10, activation: str = "relu", inputs: int = INPUTS
) -> Chain:
    """Experiments 1 and 1b: a skip at every block, α = depth^(-1/2); the projection alone has LayerNorm."""
    projection = Block(inputs, width, activation)
    blocks = [ResidualBlock(width, depth**-0.5, activation) for _ in range(depth)]
    return Chain(projection, blocks, nn.Linear(width, classes))


def bottleneck_mlp(depth: int, width: int, narrow: int, classes: int = 100, inputs: int = INPUTS) -> Chain:
    """Experiment 2: block ``depth // 2`` has ``narrow`` units, all others ``width``."""
    sizes = [width] * (depth + 1)
    sizes[depth // 2 + 1] = narrow
    projection = Block(inputs, width)
    blocks = [Block(a, b) for a, b in itertools.pairwise(sizes)]
    return Chain(projection, blocks, nn.Linear(sizes[-1], classes))


class DiamondMLP(nn.Module):
    """Experiment 4: a stem, two branches of ``depth`` blocks, a merge, a linear head.

    ``merge="sum"`` is (a + b)/√2, linear; ``merge="cat"`` is σ(W [a, b]).
    """

    def __init__(
        self,
        depth: int,
        merge: str,
        activation: str = "relu",
        width: int = 32,
        classes: int = 10,
        inputs: int = INPUTS,
    ) -> None:
        super().__init__()
        self.stem = Block(inputs, width, activation)
        self.a = nn.ModuleList([Block(width, width, activation) for _ in range(depth)])
        self.b = nn.ModuleList([Block(width, width, activation) for _ in range(depth)])
        self.merge: nn.Module = nn.Identity()
        if merge == "cat":
            self.merge = nn.Sequential(nn.Linear(2 * width, width), ACTIVATIONS[activation]())
        self.kind = merge
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        a = b = self.stem(x.flatten(1))
        for block in self.a:
            a = block(a)
        for block in self.b:
            b = block(b)
        joined = torch.cat([a, b], -1) if self.kind == "cat" else (a + b) * 0.5**0.5
        return self.head(self.merge(joined))
