"""Experiment 5 of the paper (§5.5, Appendix N.7): GN-gap of (Q, K) in attention against a per-position ReLU MLP.

The noise ``ε ∼ N(0, 0.01)`` is read as a standard deviation: a variance of 0.01 is 17 % of the teacher's signal, so no
model could reach the loss of 0.03 that the paper reports.

At init the gaps agree with Table 7. After training they do not: the gap is a residual over a slope,
``‖H_T‖/‖H_GN‖ ∝ |r|/‖Vᵀh‖`` (h the head), and the initial slope is an eighth of what fits the teacher. Whoever
lowers the loss to the paper's 0.57 must about double the slope, which divides the gap by at least three, and grows
H_GN where the paper's H_GN halves. Our numbers are exact (``mode="exact"``, float64).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dag_hesse._analyze import analyze
from dag_hesse.experiments.models import ToyAttention, ToyReluMLP
from dag_hesse.randomness import preserved

SEEDS = (42, 43, 44, 45, 46)
CHECKPOINTS = ("init", "mid", "final")
PAPER = {"init": (57.5, 16.4), "mid": (79.9, 23.3), "final": (69.3, 20.1)}  # Table 7, attention: mean, std over seeds
MODELS = {"attention": (ToyAttention, ("q", "k")), "relu-mlp": (ToyReluMLP, ("block0", "block1"))}
_D, _S, _TRAIN, _VALID, _MEASURED, _BATCH, _EPOCHS = 16, 8, 2048, 512, 64, 128, 30


@dataclass(frozen=True)
class Gap:
    """What Table 7 lists, for one model, seed and checkpoint."""

    full: float
    gn: float
    tensor: float
    gap: float
    loss: float


def teacher_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation data of the fixed tanh teacher; targets standardized by the training split."""
    g = torch.Generator().manual_seed(0)
    w_t = torch.randn(_D, _D, generator=g) / _D**0.5
    w_r = torch.randn(_D, generator=g) / _D**0.5
    x = torch.randn(_TRAIN + _VALID, _S, _D, generator=g)
    y = torch.tanh(x @ w_t).mean(1) @ w_r + 0.01 * torch.randn(_TRAIN + _VALID, generator=g)
    train, valid = y[:_TRAIN], y[_TRAIN:]
    mean, std = train.mean(), train.std()
    return x[:_TRAIN], (train - mean) / std, x[_TRAIN:], (valid - mean) / std


def measure(model: nn.Module, points: tuple[str, str], x: Tensor, y: Tensor) -> Gap:
    """The pair's exact norms on the first 64 samples, in float64, and the loss (mean squared error) on all."""
    double = type(model)().double()
    double.load_state_dict(model.state_dict())
    report = analyze(double, (x[:_MEASURED].double(), y[:_MEASURED].double()), points=list(points), mode="exact")
    i, j = report.index(points[0]), report.index(points[1])
    with torch.no_grad():
        loss = float(F.mse_loss(model(x), y))
    maps = (report.resonance, report.gn_norm, report.tensor_norm, report.gn_gap)
    full, gn, tensor, gap = (float(values[i, j]) for values in maps)
    return Gap(full, gn, tensor, gap, loss)


def train_and_measure(name: str, seed: int, epochs: int = _EPOCHS) -> dict[str, Gap]:
    """Train one model by the paper's protocol and measure it at init, mid and final; without epochs, at init alone."""
    kind, points = MODELS[name]
    x, y, x_valid, y_valid = teacher_data()
    with preserved():
        torch.manual_seed(seed)
        model = kind()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        found = {"init": measure(model, points, x_valid, y_valid)}
        for epoch in range(epochs):
            for index in torch.randperm(_TRAIN).split(_BATCH):
                optimizer.zero_grad()
                F.mse_loss(model(x[index]), y[index]).backward()
                optimizer.step()
            schedule.step()
            if epoch + 1 == epochs // 2:
                found["mid"] = measure(model, points, x_valid, y_valid)
        if epochs:
            found["final"] = measure(model, points, x_valid, y_valid)
    return found


def run() -> dict[str, dict[str, list[Gap]]]:
    """All models, seeds and checkpoints: ``{model: {checkpoint: [Gap per seed]}}``."""
    results: dict[str, dict[str, list[Gap]]] = {}
    for name in MODELS:
        runs = [train_and_measure(name, seed) for seed in SEEDS]
        results[name] = {checkpoint: [r[checkpoint] for r in runs] for checkpoint in CHECKPOINTS}
    return results


def main() -> None:
    """Print Table 7 beside the paper's figures."""
    table = Table(caption="GN-gap of (Q, K) and of (block0, block1): mean ± std over seeds 42-46")
    for column in ("model", "when", "‖H_GN‖", "‖H_T‖", "gap", "paper", "loss"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, by_checkpoint in run().items():
        for checkpoint, gaps in by_checkpoint.items():
            mean = {key: np.mean([getattr(g, key) for g in gaps]) for key in ("gn", "tensor", "gap", "loss")}
            paper = PAPER[checkpoint] if name == "attention" else None
            table.add_row(
                name,
                checkpoint,
                *(f"{mean[key]:.2g}" for key in ("gn", "tensor")),
                f"{mean['gap']:.1f} ± {np.std([g.gap for g in gaps]):.1f}" if mean["gap"] else "0 (exactly)",
                f"{paper[0]} ± {paper[1]}" if paper else "~1e-7",
                f"{mean['loss']:.2f}",
            )
    Console().print(table)
