"""How far sweeps have come, shown on stderr: a bar in a terminal, a line a stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dag_hesse.errors import OptionError
from dag_hesse.randomness import preserved

Report = Callable[[str, int, int], None]  # (stage, sweeps done, sweeps predicted)
_STEPS = 10  # lines a stage, where there is no terminal


@contextmanager
def shown(progress: Report | bool | None) -> Iterator[Report | None]:
    """What to call with (stage, done, total) while the context is open; None where nothing is to be shown.

    Args:
        progress: a callable is taken as it is; True: a bar on stderr, or lines where that is no terminal; False, None:
            nothing.

    Raises:
        OptionError: it is none of these.
    """
    if progress is None or progress is False:
        yield None
    elif progress is True:
        with preserved():  # what is imported for it draws random numbers
            import rich.progress  # noqa: F401
        with _bar() as update:
            yield update
    elif callable(progress):
        yield progress
    else:
        raise OptionError(f"progress={progress!r}; expected True, False, None or a callable of (stage, done, total).")


@contextmanager
def _bar() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


class _Lines:
    """A line whenever another tenth of a stage is done."""

    def __init__(self) -> None:
        self.said: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        step = _STEPS * done // max(total, 1)
        if self.said.get(stage) != step:
            self.said[stage] = step
            print(f"dag-hesse: {stage} {done}/{total} sweeps", file=sys.stderr)
