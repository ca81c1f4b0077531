"""A monitor as a callback of Lightning."""

from __future__ import annotations

from typing import Any

import torch

from dag_hesse.errors import DependencyError, OptionError, integer
from dag_hesse.monitor.monitor import Monitor
from dag_hesse.monitor.subject import beside

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ImportError as error:
        raise DependencyError("the callback needs Lightning: pip install lightning.") from error


class MonitorCallback(Callback):
    """``Trainer(callbacks=[MonitorCallback(batch, every=100)])``: measurements go to the trainer's loggers.

    They are in ``trainer.callback_metrics`` too, so other callbacks can watch them. Checkpoints have the monitor's
    state. Of several processes the first measures, or with ``mesh=`` all together.

    Args:
        batch: as for :class:`~dag_hesse.Monitor`; its tensors are moved to the model's device.
        submodule: which part of the ``LightningModule`` is the model, as ``"net"``; ``""``: the whole, whose
            ``forward`` gives what the loss takes.
        optimizer: which of the trainer's optimizers; None: curvature by all parameters that require gradients.
        options: as for :class:`~dag_hesse.Monitor`.

    Attributes:
        monitor: the :class:`~dag_hesse.Monitor`, once training has begun.

    Raises:
        DagHesseError: as for :class:`~dag_hesse.Monitor`, when training begins.

    Examples:
        >>> import torch
        >>> from dag_hesse.monitor.lightning import MonitorCallback
        >>> MonitorCallback((torch.randn(8, 3), torch.arange(8) % 2), submodule="net", every=50).monitor is None
        True
    """

    def __init__(self, batch: Any, *, submodule: str = "", optimizer: int | None = 0, **options: Any) -> None:
        self.batch, self.submodule, self.options = batch, submodule, options
        self.optimizer = None if optimizer is None else integer("optimizer", optimizer, 0)
        self.monitor: Monitor | None = None
        self._state: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Capture, and go on from a checkpoint's state."""
        if not trainer.is_global_zero and self.options.get("mesh") is None:
            return
        count, place = len(trainer.optimizers), self.optimizer
        if place is not None and place >= count:
            raise OptionError(f"optimizer={place}; expected the number of one of the trainer's {count}, or None.")
        model = pl_module.get_submodule(self.submodule)
        optimizer = None if place is None else trainer.optimizers[place]
        self.monitor = Monitor(model, beside(model, self.batch), optimizer=optimizer, **self.options)
        if self._state:
            self.monitor.load_state_dict(self._state)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure if it is time to; steps are the optimizer's, however many batches one takes."""
        if self.monitor is None:
            return
        metrics = self.monitor.step(trainer.global_step)
        if metrics is not None:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def state_dict(self) -> dict[str, Any]:
        """The monitor's, for the checkpoint."""
        return self._state if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training begins."""
        self._state = state_dict
