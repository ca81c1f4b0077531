"""Models that the experiments, the benchmark and the command line share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Activation = Callable[[], nn.Module]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; ``skip=False`` leaves the shortcut out (the paper's plain network)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation, skip: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = activation()
        self.skip = skip
        self.downsample = _downsample(inputs, width, stride) if skip else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.skip:
            y = y + (x if self.downsample is None else self.downsample(x))
        return self.act2(y)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions with a fourfold wider output."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation, skip: bool = True) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = activation()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.act3 = activation()
        self.skip = skip
        self.downsample = _downsample(inputs, outputs, stride) if skip else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(y)))))
        if self.skip:
            y = y + (x if self.downsample is None else self.downsample(x))
        return self.act3(y)


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """The ImageNet ResNet (He et al., 2016): 7×7 stem with max-pooling, four stages, linear head."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        classes: int = 10,
        activation: Activation = nn.ReLU,
        skip: bool = True,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), activation(), nn.MaxPool2d(3, 2, 1)
        )
        channels = width
        for k, depth in enumerate(depths, start=1):
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if k > 1 and j == 0 else 1
                blocks.append(block(channels, width * 2 ** (k - 1), stride, activation, skip))
                channels = width * 2 ** (k - 1) * block.expansion
            setattr(self, f"layer{k}", nn.Sequential(*blocks))
        self.stages = len(depths)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for k in range(1, self.stages + 1):
            x = getattr(self, f"layer{k}")(x)
        return self.head(self.pool(x).flatten(1))


def resnet18(classes: int = 10, activation: Activation = nn.ReLU, skip: bool = True, width: int = 64) -> ResNet:
    """ResNet-18; ``skip=False`` is the paper's plain network."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, activation, skip, width)


def resnet50(classes: int = 1000, activation: Activation = nn.ReLU, width: int = 64) -> ResNet:
    """ResNet-50."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, activation, width=width)


def mlp(sizes: Sequence[int], activation: Activation = nn.ReLU) -> nn.Sequential:
    """Linear layers of the given sizes with activations between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class ToyAttention(nn.Module):
    """Single-head self-attention, mean-pool, linear head (paper, Appendix N.7; 785 parameters at d=16)."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, d, bias=False)
        self.v = nn.Linear(d, d, bias=False)
        self.head = nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).mT / math.sqrt(x.shape[-1]), dim=-1)
        return self.head((weights @ self.v(x)).mean(1)).squeeze(-1)


class ToyReluMLP(nn.Module):
    """Three per-position Linear+ReLU blocks, mean-pool, linear head (paper, Appendix N.7; 833 parameters at d=16)."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.block0 = nn.Sequential(nn.Linear(d, d), nn.ReLU())
        self.block1 = nn.Sequential(nn.Linear(d, d), nn.ReLU())
        self.block2 = nn.Sequential(nn.Linear(d, d), nn.ReLU())
        self.head = nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(self.block0(x))).mean(1)).squeeze(-1)
