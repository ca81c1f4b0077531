"""The demo: a small network learns to read scikit-learn's handwritten digits, with a monitor beside it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag_hesse.experiments.digits import accuracy, load_digits
from dag_hesse.figures import check_figure, save_figure
from dag_hesse.files import show
from dag_hesse.monitor.monitor import Monitor
from dag_hesse.monitor.quantities import Numbers

HELD_OUT = 297  # digits
_SHOWN = ("loss", "sharpness", "stability", "update", "update_tensor")


def mlp() -> nn.Module:
    """Three layers with tanh."""
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ((64, 64), (64, 64), (64, 64))]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))


def cnn() -> nn.Module:
    """Three convolutions with BatchNorm and SiLU, and dropout before the head."""
    widths = (1, 16, 32, 32)
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 3, 1 if k == 0 else 2, 1), nn.BatchNorm2d(b), nn.SiLU())
        for k, (a, b) in enumerate(itertools.pairwise(widths))
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "mlp": mlp}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.003),
}


def digits() -> tuple[Tensor, Tensor]:
    """The digits as 8×8 images of one channel, zero mean and unit variance."""
    images, labels = load_digits()
    return F.avg_pool2d(images[:, :1], 4), labels


def run(
    model_name: str, optimizer_name: str, seconds: float, every: int, budget: str | None, out: Path, quiet: bool = False
) -> Monitor:
    """Train for ``seconds``, print measurements as they come, and draw them to ``out``.

    Raises:
        DependencyError: scikit-learn or matplotlib is not installed.
        OptionError: ``out`` names no figure.
        WriteError: it cannot be written.
    """
    check_figure(out)
    torch.manual_seed(0)
    images, labels = digits()
    x, y = images[HELD_OUT:], labels[HELD_OUT:]
    model = MODELS[model_name]()
    optimizer = OPTIMIZERS[optimizer_name](model)
    monitor = Monitor(model, (x[:128], y[:128]), every, budget, optimizer=optimizer)
    first = [group["lr"] for group in optimizer.param_groups]
    order, step, start = torch.Generator().manual_seed(0), 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or step == 0:
        fall = 0.1 if spent > 0.7 * seconds else 1.0  # what a learning rate that falls does to curvature
        for group, lr in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = fall * lr
        index = torch.randint(len(x), (64,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        metrics = monitor.step(step)
        step += 1
        if metrics is not None and not quiet:
            show(_line(step - 1, metrics))
    training = time.perf_counter() - start - monitor.seconds
    figure = monitor.plot()
    save_figure(figure, out)
    if not quiet:
        count = len(monitor.history["curvature/loss"])
        ratio = monitor.seconds / count / (training / step)
        score = accuracy(model.eval(), images[:HELD_OUT], labels[:HELD_OUT])
        show(f"{step} steps; {score:.1%} of {HELD_OUT} held-out digits are read right")
        show(f"{count} measurements took as long as {ratio:.0f} steps each; curves are in {out.resolve()}")
    return monitor


def _line(step: int, metrics: Numbers) -> str:
    pairs = [f"{name} {metrics[f'curvature/{name}']:.3g}" for name in _SHOWN if f"curvature/{name}" in metrics]
    return f"step {step}: {', '.join(pairs)}"
