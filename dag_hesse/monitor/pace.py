"""When a measurement is due: every so many steps, and no more of the time than is allowed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from dag_hesse.errors import OptionError, integer


def share(budget: Any) -> float | None:
    """A budget as a share of the time between 0 and 1; None: all that is wanted.

    Raises:
        OptionError: it is neither ``"2%"`` nor a number between 0 and 1.

    Examples:
        >>> share("2%"), share(0.5), share(None)
        (0.02, 0.5, None)
    """
    found = budget
    if isinstance(budget, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", budget)):
        found = float(match[1]) / 100
    if found is not None and (isinstance(found, bool) or not isinstance(found, Real) or not 0 < float(found) < 1):
        raise OptionError(f"budget={budget!r}; expected a share of the time: '2%', a number between 0 and 1, or None.")
    return None if found is None else float(found)


class Pace:
    """Says which steps are measured: multiples of ``every``, put off while measurements would take too much time.

    Args:
        every: steps between measurements, at least.
        budget: share of the time since the first call that measurements may take; None: any.
        clock: the time in seconds.
        agree: from a step, and whether there is time for it by this process's clock, to whether there is by the clock
            that all processes go by. It is asked where steps alone do not decide, so by all processes or by none.

    Attributes:
        last: number of the last call's step; None before the first.
        stride: by how much steps went up last.
        spent: seconds that measurements took.
        cost: seconds that the next one is expected to take.
    """

    def __init__(
        self,
        every: int,
        budget: float | None,
        clock: Callable[[], float] = time.perf_counter,
        agree: Callable[[int, bool], bool] = lambda step, mine: mine,
    ) -> None:
        self.every, self.budget, self.clock, self.agree = every, budget, clock, agree
        self.last: int | None = None
        self.stride = 1
        self.next: int | None = None  # the least step to measure at; None: any
        self.spent = self.cost = 0.0
        self._before = 0.0  # seconds of training up to where it was resumed
        self._start: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the first call, and in the runs that this one resumes."""
        return self._before + (0.0 if self._start is None else self.clock() - self._start)

    def arrive(self, step: int) -> bool:
        """Note a call; True for the first of all. Steps that go back begin anew from there."""
        first = self.last is None
        if self._start is None:
            self._start = self.clock()
        if self.last is not None and step > self.last:
            self.stride = step - self.last
        elif self.last is not None and step < self.last:
            self.next = self._multiple(step)
        self.last = step
        return first

    def due(self, step: int) -> bool:
        """Whether ``step`` is to be measured, as far as can be said now. Later it is so too, until it is measured."""
        if self.next is not None and step < self.next:
            return False
        return self.budget is None or self.agree(step, self.spent + self.cost <= self.budget * self.elapsed)

    def _multiple(self, step: int) -> int:
        """The first multiple of ``every`` from ``step`` on."""
        return -(-step // self.every) * self.every

    @contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Count what happens inside as the measurement at ``step``."""
        start = self.clock()
        try:
            yield
        finally:
            self.cost = self.clock() - start
            self.spent += self.cost
            self.next = self._multiple(step + 1)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        names = ("last", "stride", "next", "spent", "cost")
        return {name: getattr(self, name) for name in names} | {"elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in ("last", "next"):
            setattr(self, name, None if state[name] is None else integer(name, state[name]))
        self.stride, self.spent, self.cost = integer("stride", state["stride"], 1), state["spent"], state["cost"]
        self._before, self._start = state["elapsed"], None
