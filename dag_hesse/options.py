"""Options that no function takes: told by a typed error that names the nearest one that it does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from dag_hesse.errors import UnknownOptionError, suggest

F = TypeVar("F", bound=Callable[..., Any])
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def known_options(*functions: Callable[..., Any]) -> list[str]:
    """Names that the functions take as keywords, each once.

    >>> def scaled(x, *, by=1, **options): ...
    >>> known_options(scaled, sorted)
    ['x', 'by', 'key', 'reverse']
    """
    found: dict[str, None] = {}
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind in _BY_NAME:
                found[name] = None
    return [name for name in found if name not in ("self", "cls")]


def checked_options(*onward: Callable[..., Any]) -> Callable[[F], F]:
    """A function that refuses keywords which neither it nor the functions that it hands its ``**options`` to take.

    Examples:
        >>> @checked_options()
        ... def solve(x, *, damping=0.0): ...
        >>> solve(1, dampign=1.0)
        Traceback (most recent call last):
        ...
        dag_hesse.errors.UnknownOptionError: solve() has no option 'dampign'. Near names: 'damping'.
    """

    def of(function: F) -> F:
        known: list[str] = []

        @functools.wraps(function)
        def checked(*args: Any, **options: Any) -> Any:
            if not known:
                known.extend(known_options(function, *onward))
            for name in options:
                if name not in known:
                    called = function.__qualname__.removesuffix(".__init__").split(".")[-1]
                    raise UnknownOptionError(f"{called}() has no option '{name}'. {suggest(name, known)}")
            return function(*args, **options)

        return checked  # type: ignore[return-value]

    return of
