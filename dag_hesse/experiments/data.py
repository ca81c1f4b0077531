"""Data of the experiments: CIFAR-10 and CIFAR-100 from a folder, else scikit-learn's digits as a stand-in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dag_hesse.errors import MissingFileError
from dag_hesse.experiments.cifar import CIFAR10, CIFAR100, Layout, read
from dag_hesse.experiments.digits import load_digits
from dag_hesse.experiments.measure import Batch

Prepare = Callable[[Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class Split:
    """Samples, and what makes a model's input of some of them; a generator is given in training alone."""

    x: Tensor
    y: Tensor
    prepare: Prepare

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index: Tensor | slice, generator: torch.Generator | None = None) -> Batch:
        """Inputs and targets."""
        return self.prepare(self.x[index], generator), self.y[index]


@dataclass(frozen=True)
class Data:
    """A data set; ``note`` says what is not the paper's about it."""

    name: str
    train: Split
    test: Split
    classes: int
    note: str = ""
    trainable: bool = True

    @property
    def digest(self) -> str:
        """Of the first test samples and the numbers of samples: whether two runs saw the same data."""
        seen = hashlib.sha256(f"{len(self.train)} {len(self.test)} {self.classes}".encode())
        for tensor in (self.test.x[:256], self.test.y[:256]):
            seen.update(tensor.contiguous().numpy().tobytes())
        return seen.hexdigest()[:16]


def scaled(mean: tuple[float, ...], std: tuple[float, ...], augment: bool = False) -> Prepare:
    """Pixels 0…255 to (x/255 − mean)/std by channel; ``augment``: random crops of a border of 4, and flips."""
    center, width = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))

    def prepare(x: Tensor, generator: torch.Generator | None) -> Tensor:
        if augment and generator is not None:
            x = augmented(x, generator)
        return x.float().div_(255).sub_(center).div_(width)

    return prepare


HALVES = scaled((0.5,) * 3, (0.5,) * 3)  # to [−1, 1]: experiments 1 to 4
CHANNELS = scaled((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), augment=True)  # experiment 6


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image cut out of a black border of 4 at a random place, and mirrored half of the time."""
    count, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = torch.arange(width).expand(count, -1)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns) + left[:, None]
    rows = torch.arange(height) + top[:, None]
    sample = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def images(folder: Path | None, prepare: Prepare, classes: int = 10) -> Data:
    """CIFAR of so many classes from ``folder``, else a stand-in.

    With 100 classes and no CIFAR-100 in the folder, CIFAR-10's images get 100 random labels, and cannot be learnt.

    Raises:
        MissingFileError: there is neither in the folder.
        DatasetError: a file has another size or content than it must have.
    """
    if folder is None:
        found = digits(prepare)
        return found if classes == 10 else relabelled(found, classes)
    if not folder.is_dir():
        raise MissingFileError(f"--data {folder} is no folder; expected the one that CIFAR was unpacked into.")
    if classes == 100 and CIFAR100.inside(folder):
        return cifar(folder, CIFAR100, prepare)
    found = cifar(folder, CIFAR10, prepare)
    return found if classes == 10 else relabelled(found, classes)


def cifar(folder: Path, layout: Layout, prepare: Prepare) -> Data:
    """Both splits of one of the two."""
    parts = [Split(*read(folder, layout, split), prepare) for split in ("train", "test")]
    return Data(layout.name, parts[0], parts[1], layout.classes)


def digits(prepare: Prepare) -> Data:
    """The 1,797 handwritten digits as 32×32 images of three equal channels, 297 of them for testing."""
    x, y = load_digits()
    low, high = x.min(), x.max()
    pixels = ((x - low) / (high - low) * 255).round().to(torch.uint8)
    train, test = Split(pixels[297:], y[297:], prepare), Split(pixels[:297], y[:297], prepare)
    return Data("scikit-learn's digits", train, test, 10, "a stand-in: the paper has CIFAR")


def relabelled(data: Data, classes: int) -> Data:
    """Random labels of more classes: right for curvature at initialization only."""
    generator = torch.Generator().manual_seed(0)

    def other(split: Split) -> Split:
        return replace(split, y=torch.randint(0, classes, (len(split),), generator=generator))

    note = f"a stand-in: images of {data.name} with {classes} random labels, at initialization only"
    return Data(f"{data.name}, random labels", other(data.train), other(data.test), classes, note, trainable=False)
