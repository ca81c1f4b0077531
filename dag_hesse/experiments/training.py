"""Training by a recipe, an epoch at a time, from a state that can be written down and taken up again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag_hesse.experiments.data import Split

_EVALUATED = 1000  # samples at once


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: the paper's common protocol (§5) unless said otherwise.

    Attributes:
        epochs: 0 leaves it at its initialization.
        rate: learning rate at first; it falls to zero along a cosine.
        clip: largest norm of a gradient; None: any.
        adam: Adam instead of SGD with momentum.
    """

    epochs: int = 50
    rate: float = 0.01
    momentum: float = 0.9
    decay: float = 1e-4
    batch: int = 128
    clip: float | None = 1.0
    adam: bool = False

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Of all parameters."""
        if self.adam:
            return torch.optim.Adam(model.parameters(), lr=self.rate, weight_decay=self.decay, fused=True)
        return torch.optim.SGD(
            model.parameters(), lr=self.rate, momentum=self.momentum, weight_decay=self.decay, fused=True
        )

    @property
    def checkpoints(self) -> dict[str, int]:
        """Epochs after which is measured: before training, after half of it, and at its end (§5)."""
        found = {"init": 0, "mid": self.epochs // 2, "final": self.epochs}
        return {name: epoch for name, epoch in found.items() if name == "init" or epoch > 0}


def criterion(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of float targets, else cross-entropy."""
    return F.mse_loss(output, target) if target.is_floating_point() else F.cross_entropy(output, target)


class Training:
    """A model under way. The order of samples comes from a generator of its own, so that a run can be taken up."""

    def __init__(self, model: nn.Module, recipe: Recipe, seed: int) -> None:
        self.model, self.recipe, self.epoch = model, recipe, 0
        self.optimizer = recipe.optimizer(model)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(recipe.epochs, 1))
        self.order = torch.Generator().manual_seed(seed)

    def run_epoch(self, data: Split, progress: Callable[[int, int], None] | None = None) -> None:
        """One pass over the data in a new order; the last batch may be smaller."""
        self.model.train()
        batches = torch.randperm(len(data), generator=self.order).split(self.recipe.batch)
        for k, index in enumerate(batches):
            x, y = data.batch(index, self.order)
            self.optimizer.zero_grad()
            criterion(self.model(x), y).backward()
            if self.recipe.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            self.optimizer.step()
            if progress is not None:
                progress(k + 1, len(batches))
        self.schedule.step()
        self.epoch += 1

    def state(self) -> dict[str, Any]:
        """All that a run is taken up from."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "order": self.order.get_state(),
        }

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.order.set_state(state["order"])


@torch.no_grad()
def evaluated(model: nn.Module, data: Split) -> dict[str, float]:
    """Mean loss, and accuracy where targets are classes: one a sample, or one a place of it."""
    model.eval()
    loss = right = 0.0
    for index in torch.arange(len(data)).split(_EVALUATED):
        x, y = data.batch(index)
        output = model(x)
        loss += float(criterion(output, y)) * len(y)
        right += 0.0 if y.is_floating_point() else float((output.argmax(1) == y).sum()) / y[0].numel()
    found = {"loss": loss / len(data)}
    return found if data.y.is_floating_point() else found | {"accuracy": right / len(data)}
