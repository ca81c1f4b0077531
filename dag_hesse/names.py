"""Globs over dotted names: ``*`` stays within one part of a name, ``**`` crosses dots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from dag_hesse.errors import PointError, position

_PIECES = {"**": ".*", "*": "[^.]*", "?": "[^.]"}


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern)

    def translated(piece: str) -> str:
        if len(piece) > 2 and piece[0] == "[" and piece[-1] == "]":
            inside = piece[1:-1].replace("\\", r"\\").replace("[", r"\[")
            return f"[{'^' + inside[1:] if inside[0] == '!' else inside}]"
        return _PIECES.get(piece, re.escape(piece))

    try:
        return re.compile("".join(map(translated, pieces)), re.DOTALL)
    except re.error:  # as [z-a]: no set of characters
        return re.compile(re.escape(pattern))


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name matches a glob: ``*`` and ``?`` do not stand for dots, ``**`` does, ``[…]`` is a set.

    >>> matches("layer1.0.conv", "layer*"), matches("layer1.0.conv", "layer**"), matches("layer1", "layer[12]")
    (False, True, True)
    """
    return _compiled(pattern).fullmatch(name) is not None


def modules_of(names: Iterable[str]) -> list[str]:
    """Every dotted beginning of the names, outermost first.

    >>> modules_of(["a.b.weight", "a.bias"])
    ['a', 'a.b']
    """
    found = dict.fromkeys(name[:k] for name in names for k, sign in enumerate(name) if sign == ".")
    return list(found)


def innermost(pattern: str, names: Sequence[str]) -> list[str]:
    """Names that match a glob, and modules that do and in which no name does.

    >>> innermost("*", ["scale", "a.weight", "a.bias"]), innermost("**", ["scale", "a.weight", "a.bias"])
    (['scale', 'a'], ['scale', 'a.weight', 'a.bias'])
    """
    own = [name for name in names if matches(name, pattern)]
    groups: list[str] = []
    for module in reversed(modules_of(names)):  # inner modules come before those around them
        inside = any(name.startswith(module + ".") for name in (*own, *groups))
        if matches(module, pattern) and not inside and module not in names:
            groups.append(module)
    return own + groups[::-1]


def selected(names: Sequence[str], patterns: Any, where: str) -> list[int]:
    """Places of the names that patterns stand for, in order: names, globs, modules around names, or places.

    Raises:
        PointError: one stands for none in ``where``.

    >>> selected(["a.weight", "a.bias", "b.weight"], ["a", -1], "this"), selected(["a", "b.c"], "**", "this")
    ([0, 1, 2], [0, 1])
    """
    several = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    found = set[int]()
    for pattern in patterns if several else [patterns]:
        found |= set(_places(names, pattern)) or {position(pattern, names, where)}
    if not found:
        raise PointError(f"{patterns!r} names no point of {where}; expected names, globs or positions.")
    return sorted(found)


def _places(names: Sequence[str], pattern: Any) -> list[int]:
    if not isinstance(pattern, str):
        return []
    if pattern in names:
        return [names.index(pattern)]
    chosen = innermost(pattern, names)
    return [k for k, name in enumerate(names) if any(name == n or name.startswith(n + ".") for n in chosen)]
