"""The call that made a report, as text that makes it again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

_SILENT = ("progress",)  # say nothing of the result


def call_text(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """A call with the options that differ from their defaults; what is no literal stands there by its own name.

    >>> def analyze(model, batch, *, loss=None, points=None, probes=32): ...
    >>> call_text(analyze, {"model": 1, "batch": 2, "loss": max, "points": ("a", "b"), "probes": 32})
    "dag_hesse.analyze(model, batch, loss=loss, points=['a', 'b'])"
    """
    said = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            said.append(name)
        elif name not in _SILENT and not _same(given[name], parameter.default):
            said.append(f"{name}={_literal(given[name]) or name}")
    return f"dag_hesse.{function.__name__}({', '.join(said)})"


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (Number, str)) and bool(value == default))  # not so of arrays


def _literal(value: Any) -> str:
    if isinstance(value, Number):
        return repr(getattr(value, "item", lambda: value)())  # NumPy's as Python's
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, Sequence) and all(inner := [_literal(x) for x in value]):
        return f"[{', '.join(inner)}]"
    return ""
