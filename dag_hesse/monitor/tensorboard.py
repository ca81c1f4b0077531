"""A monitor that writes to TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dag_hesse.errors import DependencyError, OptionError, kind_of
from dag_hesse.monitor.monitor import Monitor
from dag_hesse.monitor.quantities import Numbers


class MonitorWriter:
    """Calls a monitor, and writes what it measures as scalars.

    Args:
        monitor: the :class:`~dag_hesse.Monitor`.
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or the folder for one.

    Raises:
        DependencyError: tensorboard is not installed.
        OptionError: ``writer`` is neither.

    Examples:
        >>> import tempfile, torch, dag_hesse as dh
        >>> from dag_hesse.monitor.tensorboard import MonitorWriter
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.arange(8) % 2)
        >>> monitor = dh.Monitor(model, batch, quantities=["loss", "sharpness"])
        >>> with tempfile.TemporaryDirectory() as folder, MonitorWriter(monitor, folder) as writer:
        ...     sorted(writer.step(0))
        ['curvature/abrupt', 'curvature/failed', 'curvature/loss', 'curvature/sharpness']
    """

    def __init__(self, monitor: Monitor, writer: Any) -> None:
        self.monitor = monitor
        self._own = isinstance(writer, (str, Path))
        if not self._own and not hasattr(writer, "add_scalar"):
            raise OptionError(f"writer is {kind_of(writer)}; expected a SummaryWriter, or a folder's name.")
        self.writer = _open(writer) if self._own else writer

    def step(self, step: int) -> Numbers | None:
        """As :meth:`dag_hesse.Monitor.step`."""
        metrics = self.monitor.step(step)
        for name, value in (metrics or {}).items():
            self.writer.add_scalar(name, value, step)
        return metrics

    def close(self) -> None:
        """Close the writer if it was made here, else have it write what it has."""
        (self.writer.close if self._own else self.writer.flush)()

    def __enter__(self) -> MonitorWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _open(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DependencyError("the writer needs TensorBoard: pip install tensorboard.") from error
    return SummaryWriter(str(folder))
