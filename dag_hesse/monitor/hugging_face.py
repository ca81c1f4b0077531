"""A monitor as a callback of Hugging Face's ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dag_hesse.errors import DependencyError
from dag_hesse.monitor.monitor import Monitor
from dag_hesse.monitor.subject import beside

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise DependencyError("the callback needs transformers: pip install 'transformers[torch]'.") from error

FILE = "dag_hesse_monitor.pt"  # in a checkpoint's folder


class MonitorCallback(TrainerCallback):
    """``trainer.add_callback(MonitorCallback(trainer, batch, every=100))``: measurements go through ``trainer.log``.

    So they are in ``trainer.state.log_history`` and in whatever the trainer reports to. Checkpoints' folders have the
    monitor's state, and training that is resumed from one in ``args.output_dir`` finds it. Of several processes the
    first measures, or with ``mesh=`` all together.

    Args:
        trainer: the ``Trainer``.
        batch: as for :class:`~dag_hesse.Monitor`, for example a dict with ``labels``; moved to the model's device.
        options: as for :class:`~dag_hesse.Monitor`.

    Attributes:
        monitor: the :class:`~dag_hesse.Monitor`, once training has begun.

    Raises:
        DagHesseError: as for :class:`~dag_hesse.Monitor`, when training begins.
    """

    def __init__(self, trainer: Any, batch: Any, **options: Any) -> None:
        self.trainer, self.batch, self.options = trainer, batch, options
        self.monitor: Monitor | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **rest: Any
    ) -> None:
        """Capture, and go on from the state of the checkpoint that training is resumed from."""
        if not state.is_world_process_zero and self.options.get("mesh") is None:
            return
        self.monitor = Monitor(model, beside(model, self.batch), optimizer=optimizer, **self.options)
        saved = _folder(args, state) / FILE
        if state.global_step and saved.exists():
            self.monitor.load_state_dict(torch.load(saved, weights_only=True, map_location="cpu"))

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Measure if it is time to."""
        metrics = None if self.monitor is None else self.monitor.step(state.global_step)
        if metrics is not None:
            wanted = control.should_log
            self.trainer.log(metrics)
            control.should_log = wanted  # logging takes it back, and the trainer's own is still to come

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Keep the state beside the checkpoint's."""
        if state.is_world_process_zero and self.monitor is not None and (folder := _folder(args, state)).is_dir():
            torch.save(self.monitor.state_dict(), folder / FILE)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
