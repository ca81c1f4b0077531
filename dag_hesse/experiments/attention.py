"""Experiment 5 of the paper (§5.5, Appendix N.7): GN-gap of (Q, K) in attention against a per-position ReLU MLP."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dag_hesse.analyze import analyze
from dag_hesse.experiments.models import ToyAttention, ToyReluMLP

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
    y = torch.tanh(x @ w_t).mean(1) @ w_r + 0.1 * torch.randn(_TRAIN + _VALID, generator=g)
    train, valid = y[:_TRAIN], y[_TRAIN:]
    mean, std = train.mean(), train.std()
    return x[:_TRAIN], (train - mean) / std, x[_TRAIN:], (valid - mean) / std


def measure(model: nn.Module, points: tuple[str, str], x: Tensor, y: Tensor) -> Gap:
    """The pair's exact norms on a batch, in float64 (mean squared error)."""
    double = type(model)().double()
    double.load_state_dict(model.state_dict())
    report = analyze(double, (x[:_MEASURED].double(), y[:_MEASURED].double()), points=list(points), mode="exact")
    i, j = report.index(points[0]), report.index(points[1])
    return Gap(
        *(float(values[i, j]) for values in (report.resonance, report.gn_norm, report.tensor_norm, report.gn_gap)),
        loss=float(report.facts["loss"]),
    )


def train_and_measure(name: str, seed: int) -> dict[str, Gap]:
    """Train one model by the paper's protocol and measure it at init, mid and final."""
    kind, points = MODELS[name]
    x, y, x_valid, y_valid = teacher_data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS)
        found = {"init": measure(model, points, x_valid, y_valid)}
        for epoch in range(_EPOCHS):
            for index in torch.randperm(_TRAIN).split(_BATCH):
                optimizer.zero_grad()
                F.mse_loss(model(x[index]), y[index]).backward()
                optimizer.step()
            schedule.step()
            if epoch + 1 == _EPOCHS // 2:
                found["mid"] = measure(model, points, x_valid, y_valid)
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
    table = Table(title="Experiment 5: GN-gap of (Q, K) and of (block0, block1), five seeds 42–46")
    for column in ("model", "checkpoint", "‖H‖_F", "‖H_GN‖_F", "‖H_T‖_F", "gap (mean ± std)", "paper", "loss"):
        table.add_column(column, justify="right")
    for name, by_checkpoint in run().items():
        for checkpoint, gaps in by_checkpoint.items():
            mean = {key: np.mean([getattr(g, key) for g in gaps]) for key in ("full", "gn", "tensor", "gap", "loss")}
            paper = PAPER[checkpoint] if name == "attention" else None
            table.add_row(
                name,
                checkpoint,
                *(f"{mean[key]:.2g}" for key in ("full", "gn", "tensor")),
                f"{mean['gap']:.1f} ± {np.std([g.gap for g in gaps]):.1f}" if mean["gap"] else "0 (exactly)",
                f"{paper[0]} ± {paper[1]}" if paper else "~1e-7 (float32)",
                f"{mean['loss']:.2f}",
            )
    Console().print(table)
