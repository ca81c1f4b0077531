"""The demo: ResNet-18 with ReLU and SiLU on scikit-learn's handwritten digits, curvature before and after training."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag_hesse._analyze import analyze
from dag_hesse.errors import DependencyError
from dag_hesse.experiments.models import resnet18
from dag_hesse.figures import save_figure
from dag_hesse.report import CurvatureReport
from dag_hesse.report.plots import heat_maps

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
METRICS = ("resonance", "coupling", "stable_rank", "gn_gap")


def load_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits as 32×32 images of 3 equal channels, zero mean and unit variance, in a fixed random order."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DependencyError("the digits ship with scikit-learn: pip install 'dag-hesse[demo]'.") from error
    data = load()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(images, (32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = (images - images.mean()) / images.std()
    return images[order].contiguous(), torch.tensor(data.target)[order]


def train(model: nn.Module, images: Tensor, labels: Tensor, seconds: float, seed: int = 0) -> int:
    """SGD with momentum and a learning rate that falls to zero over ``seconds``; returns the epochs done."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    start, epochs = time.perf_counter(), 0
    model.train()
    while (spent := time.perf_counter() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * max(1 - spent / seconds, 0.01)
        for index in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
        epochs += 1
    model.eval()
    return epochs


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of correct predictions."""
    return float((model(images).argmax(1) == labels).float().mean())


def write(report: CurvatureReport, place: Path) -> None:
    """JSON, a report file to load again, an HTML page, and heat maps as PNG."""
    report.to_json(place.with_suffix(".json"))
    report.save(place.with_suffix(".safetensors"))
    report.to_html(place.with_suffix(".html"))
    save_figure(heat_maps(report, METRICS), place.with_suffix(".png"))


def main(arguments: Sequence[str] = ()) -> None:
    """Train both networks, print and write their maps at init and after training."""
    parser = argparse.ArgumentParser(prog="python -m dag_hesse.experiments digits", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60, help="training time of each network (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-report"), help="folder to write to (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    images, labels = load_digits()
    held_out, rest = slice(0, 297), slice(297, None)
    batch = (images[held_out][:32], labels[held_out][:32])
    for name, activation in ACTIVATIONS.items():
        torch.manual_seed(0)
        model = resnet18(activation=activation)
        for stage in ("init", "trained"):
            if stage == "trained":
                epochs = train(model, images[rest], labels[rest], options.seconds)
                score = accuracy(model, images[held_out], labels[held_out])
                print(f"\n{name}: {epochs} epochs, {score:.1%} of 297 held-out digits are read right")
            report = analyze(model.eval(), batch)
            print(f"\n== ResNet-18 ({name}), {stage} ==\n{report}")
            write(report, options.out / f"resnet18-{name}-{stage}")
    print(f"\nMaps as JSON, HTML and PNG are in {options.out.resolve()}")
