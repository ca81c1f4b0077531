"""What a monitor has measured so far, what of it is remarkable, and what failed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

from dag_hesse.errors import OptionError
from dag_hesse.monitor.changes import Change, change

_LOG = logging.getLogger("dag_hesse")


class Failure(NamedTuple):
    """A quantity that could not be measured.

    Attributes:
        step: where.
        quantity: which.
        reason: the error's type and text.
    """

    step: int
    quantity: str
    reason: str


class Log:
    """Series of measurements.

    Args:
        threshold: of abrupt changes.

    Attributes:
        history: per name, (step, value) in order.
        changes, failures: in order.

    Raises:
        OptionError: ``threshold`` is no positive number.
    """

    def __init__(self, threshold: Any) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, Real) or not float(threshold) > 0:
            raise OptionError(f"threshold={threshold!r}; expected a positive z-score.")
        self.threshold: float = float(threshold)
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.changes: list[Change] = []
        self.failures: list[Failure] = []

    def keep(self, step: int, metrics: Mapping[str, float]) -> int:
        """Put measurements down; returns how many of them are abrupt changes."""
        count = len(self.changes)
        for name, value in metrics.items():
            series = self.history.setdefault(name, [])
            found = change(step, name, value, [x for _, x in series], self.threshold)
            if found is not None:
                self.changes.append(found)
                _LOG.warning("abrupt change at %s", found)
            series.append((step, value))
        return len(self.changes) - count

    def failed(self, step: int, quantity: str, error: Exception) -> None:
        """Put down what went wrong."""
        self.failures.append(Failure(step, quantity, f"{type(error).__name__}: {error}"))
        text = "step %d: curvature (%s) could not be measured, training goes on"
        _LOG.warning(text, step, quantity, exc_info=error)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "history": {name: list(series) for name, series in self.history.items()},
            "changes": [tuple(found) for found in self.changes],
            "failures": [tuple(found) for found in self.failures],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, in the same lists."""
        self.history.clear()
        self.history |= {name: [(k, value) for k, value in series] for name, series in state["history"].items()}
        self.changes[:] = [Change(*found) for found in state["changes"]]
        self.failures[:] = [Failure(*found) for found in state["failures"]]
