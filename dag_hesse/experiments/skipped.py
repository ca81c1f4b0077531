"""A small DenseNet and a small U-Net for 8×8 digits, each with its chain of layers and the skips that leave it."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag_hesse.experiments.data import Data, Split
from dag_hesse.experiments.digits import load_digits

Pair = tuple[str, str]
NOISE = 0.5


def _convolution(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    layer.state_dict()["bias"].zero_()
    return nn.Sequential(layer, nn.ReLU())


class DenseNet(nn.Module):
    """Two dense blocks (Huang et al., 2017) with a transition between them, without BatchNorm.

    Every layer takes what all earlier ones of its block have put out. ``skip=False`` leaves it the last one's output: a
    chain of layers of the same widths, each initialized for the inputs that it has.
    """

    def __init__(self, skip: bool = True, layers: int = 3, growth: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.skip, start = skip, 2 * growth
        self.stem = _convolution(1, start)
        total = start + layers * growth
        widths = [start + k * growth if skip or k == 0 else growth for k in range(layers + 1)]
        self.block1 = nn.ModuleList(_convolution(n, growth) for n in widths[:-1])
        self.transition = _convolution(total if skip else growth, start, 1)
        self.block2 = nn.ModuleList(_convolution(n, growth) for n in widths[:-1])
        self.head = nn.Linear(total if skip else growth, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.transition(self._block(self.block1, self.stem(x))), 2)
        return self.head(self._block(self.block2, x).mean((2, 3)))

    def _block(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in layers:
            x = torch.cat([x, layer(x)], 1) if self.skip else layer(x)
        return x

    @property
    def chain(self) -> list[str]:
        """Its layers in order."""
        blocks = [[f"block{b}.{k}" for k in range(len(self.block1))] for b in (1, 2)]
        return ["stem", *blocks[0], "transition", *blocks[1]]

    @property
    def skips(self) -> list[Pair]:
        """Layers that are not neighbours, of which one takes the other's output, with skips."""
        count = len(self.block1)
        blocks = self.chain[: count + 2], self.chain[count + 1 :]
        return [(a, b) for own in blocks for a, b in itertools.combinations(own, 2) if own.index(b) - own.index(a) > 1]


class UNet(nn.Module):
    """Three levels down and up (Ronneberger et al., 2015), one layer each; puts out an image.

    Every layer on the way up takes what the one of its level on the way down has put out beside what comes from below.
    ``skip=False`` leaves it the latter.
    """

    def __init__(self, skip: bool = True, width: int = 4, levels: int = 3) -> None:
        super().__init__()
        self.skip = skip
        sizes = [width * 2**k for k in range(levels)]
        self.down = nn.ModuleList(_convolution(n, m) for n, m in itertools.pairwise([1, *sizes]))
        self.middle = _convolution(sizes[-1], sizes[-1])
        below = [*sizes[1:], sizes[-1]]
        self.up = nn.ModuleList(_convolution(n + skip * m, m) for n, m in zip(below, sizes, strict=True))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            kept.append(layer(x))
            x = F.avg_pool2d(kept[-1], 2)
        x = self.middle(x)
        for layer, own in zip(reversed(self.up), reversed(kept), strict=True):
            x = F.interpolate(x, scale_factor=2.0)
            x = layer(torch.cat([x, own], 1) if self.skip else x)
        return self.head(x)

    @property
    def chain(self) -> list[str]:
        """Its layers in order."""
        levels = range(len(self.down))
        return [*(f"down.{k}" for k in levels), "middle", *(f"up.{k}" for k in reversed(levels))]

    @property
    def skips(self) -> list[Pair]:
        """Layers of one level."""
        return [(f"down.{k}", f"up.{k}") for k in range(len(self.down))]


def _pixels() -> tuple[Tensor, Tensor]:
    x, y = load_digits()
    return F.avg_pool2d(x[:, :1], 4), y


def _as_it_is(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return x


def classified(folder: Path | None = None) -> Data:
    """Digits of 8×8 pixels and what they are, 297 of them for testing. A folder is not used."""
    x, y = _pixels()
    return Data(
        "scikit-learn's digits, 8×8", Split(x[297:], y[297:], _as_it_is), Split(x[:297], y[:297], _as_it_is), 10
    )


def noisy() -> Data:
    """The same with noise of half their standard deviation, to be taken away."""
    clean, _ = _pixels()
    x = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return Data(
        f"digits, 8×8, with noise of std {NOISE}",
        Split(x[297:], clean[297:], _as_it_is),
        Split(x[:297], clean[:297], _as_it_is),
        0,
    )
