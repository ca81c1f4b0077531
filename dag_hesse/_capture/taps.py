"""Tapping tensors by name, from the user's code or from forward hooks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Tapper(Protocol):
    """What takes taps while a model runs."""

    def tap(self, x: Tensor, name: str) -> Tensor:
        """Note ``x`` under a name; use the result in its place."""


_tapper: ContextVar[Tapper | None] = ContextVar("tapper", default=None)


def tap(x: Tensor, name: str) -> Tensor:
    """Tap ``x`` as a point called ``name``; outside capture this returns ``x`` itself.

    Args:
        x: any floating-point tensor of the forward pass.
        name: the point's name; taps met k times become ``name[0]`` … ``name[k-1]``.

    Returns:
        A tensor equal to ``x``: use it in place of ``x`` from here on.

    Raises:
        PointError: a module or a parameter has that name.

    Examples:
        >>> import torch, dag_hesse
        >>> x = torch.ones(2)
        >>> dag_hesse.tap(x, "gate") is x
        True
    """
    tapper = _tapper.get()
    return x if tapper is None else tapper.tap(x, name)


@contextmanager
def tapping(tapper: Tapper) -> Iterator[None]:
    """Context in which :func:`tap` goes to ``tapper``."""
    token = _tapper.set(tapper)
    try:
        yield
    finally:
        _tapper.reset(token)


def _labels(tree: Mapping[Any, Any]) -> dict[Any, str]:
    """What stands for a key in a path: a key with a dot, or with another's text (1 and "1"), is quoted."""
    text = {key: str(key) for key in tree}
    often = Counter(text.values())
    return {key: repr(key) if "." in label or often[label] > 1 else label for key, label in text.items()}


def map_tensors(tree: T, fn: Callable[[Tensor, str], Tensor], path: str = "") -> T:
    """Apply ``fn(tensor, path)`` to the tensors of nested tuples, lists, mappings and dataclasses.

    No two tensors have the same path.
    """
    if isinstance(tree, Tensor):
        return fn(tree, path)  # type: ignore[return-value]
    if isinstance(tree, Mapping):
        labels = _labels(tree)
        items = {
            key: map_tensors(value, fn, f"{path}.{labels[key]}" if path else labels[key]) for key, value in tree.items()
        }
        if all(items[key] is tree[key] for key in items):
            return tree
        return type(tree)(**items) if dataclasses.is_dataclass(tree) else type(tree)(items)  # type: ignore[call-arg]
    if isinstance(tree, (tuple, list)):
        values = [map_tensors(value, fn, f"{path}.{k}" if path else str(k)) for k, value in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)  # type: ignore[return-value]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = [f.name for f in dataclasses.fields(tree) if f.init]
        changes = {n: map_tensors(getattr(tree, n), fn, f"{path}.{n}" if path else n) for n in fields}
        return dataclasses.replace(tree, **changes)
    return tree
