"""How far sweeps have come, shown on stderr: a bar in a terminal, a line a stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from dag_hesse.errors import OptionError, takes
from dag_hesse.randomness import preserved

Report = Callable[[str, int, int], None]  # (stage, sweeps done, sweeps predicted)
_STEPS = 10  # lines a stage, where there is no terminal
_LONG = 3.0  # seconds of a stage from which on a bar comes unasked


def check_progress(progress: object) -> None:
    """Raise :class:`OptionError` unless it is True, False, None or a callable."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise OptionError(f"progress={progress!r}; expected True, False, None or a callable of (stage, done, total).")
    if callable(progress):
        takes("progress", progress, "stage, done, total")


@contextmanager
def shown(progress: Report | bool | None, unit: str = "sweeps") -> Iterator[Report | None]:
    """What to call with (stage, done, total) while the context is open; None where nothing is to be shown.

    Args:
        progress: a callable is taken as it is; True: a bar on stderr, or lines where that is no terminal; None: a bar
            where stderr is a terminal, once a stage is foreseen to take more than 3 s; False: nothing.
        unit: what is counted, in lines.

    Raises:
        OptionError: it is none of these.
    """
    check_progress(progress)
    if progress is False or (progress is None and not watched()):
        yield None
    elif progress is None:
        with ExitStack() as stack:
            yield _Foreseen(stack, unit)
    elif progress is True:
        with _bar(unit) as update:
            yield update
    else:
        yield progress  # type: ignore[misc]


def watched() -> bool:
    """Whether standard error is a terminal; it is None where it was closed (``2>&-``)."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def _bar(unit: str) -> Iterator[Report]:
    with preserved():  # what is imported for it draws random numbers
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(unit)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


class _Foreseen:
    """A bar that appears when the sweeps done so far say that their stage will take long."""

    def __init__(self, stack: ExitStack, unit: str) -> None:
        self.stack, self.unit = stack, unit
        self.bar: Report | None = None
        self.starts: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        seconds = time.perf_counter() - self.starts.setdefault(stage, time.perf_counter())
        if self.bar is None and seconds * total > _LONG * max(done, 1):
            self.bar = self.stack.enter_context(_bar(self.unit))
        if self.bar is not None:
            self.bar(stage, done, total)


class _Lines:
    """A line whenever another tenth of a stage is done."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.said: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        step = _STEPS * done // max(total, 1)
        if self.said.get(stage) != step and sys.stderr is not None:
            self.said[stage] = step
            print(f"dag-hesse: {stage} {done}/{total} {self.unit}", file=sys.stderr)
