"""Dotted names: globs over them, in which ``*`` stays within one part and ``**`` crosses dots, and shorter forms."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from rich.cells import cell_len, set_cell_size

from dag_hesse.errors import OptionError, PointError, position

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


def wider(pattern: str, names: Iterable[str]) -> str | None:
    """The pattern with ``**`` for ``*`` where that matches some name, and the pattern itself none; else None.

    >>> wider("*.bias", ["a.b.bias"]), wider("*.bias", ["a.bias"]), wider("*.scale", ["a.b.bias"])
    ('**.bias', None, None)
    """
    names, wide = list(names), pattern.replace("**", "*").replace("*", "**")
    helps = wide != pattern and any(matches(name, wide) for name in names)
    return wide if helps and not any(matches(name, pattern) for name in names) else None


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
        found |= set(places_of(names, pattern)) or {position(pattern, names, where)}
    if not found:
        raise PointError(f"{patterns!r} names no point of {where}; expected names, globs or positions.")
    return sorted(found)


def places_of(names: Sequence[str], pattern: Any) -> list[int]:
    """Places of the names that one pattern stands for: a name, a glob, or a module around names; none for others."""
    if not isinstance(pattern, str):
        return []
    if pattern in names:
        return [names.index(pattern)]
    chosen = innermost(pattern, names)
    return [k for k, name in enumerate(names) if any(name == n or name.startswith(n + ".") for n in chosen)]


def shortened(names: Sequence[str], width: int) -> list[str]:
    """The names in at most ``width`` terminal cells each, no two alike.

    Parts of dotted names become initials from the left, as many in all names as it takes. Where that is not enough, or
    two would read the same, the middle of a name is left out and, if need be, a number is put there.

    >>> shortened(["encoder.layers.0.self_attn.in_proj_weight", "encoder.layers.0.norm1.weight", "head"], 28)
    ['e.l.0.sa.in_proj_weight', 'e.l.0.n1.weight', 'head']
    >>> shortened(["blocks.first.weight", "blocks.final.weight"], 12)
    ['block…weight', 'bloc…2…eight']
    """
    if width < 8:
        raise OptionError(f"width={width}; expected at least 8.")
    for level in range(max((name.count(".") for name in names), default=0) + 1):
        found = [_initials(name, level) for name in names]
        if max(map(cell_len, found), default=0) <= width and len(set(found)) == len(set(names)):
            return found
    return _cut(names, width)


def _initials(name: str, level: int) -> str:
    """A dotted name of which the first parts, but never the last one, are initials of their words; digits stay."""
    *parts, last = name.split(".")
    short = ["".join(re.findall(r"\d+|(?:^|(?<=_))\D", part)) for part in parts[:level]]
    return ".".join([*short, *parts[level:], last])


def _cut(names: Sequence[str], width: int) -> list[str]:
    """Names of which those that are too long lack their middle."""
    found = {name: name for name in names if cell_len(name) <= width}
    taken = set(found)
    for name in dict.fromkeys(names):
        if name not in found:
            gaps = itertools.chain("…", (f"…{k}…" for k in itertools.count(2)))
            found[name] = next(short for gap in gaps if (short := _without_middle(name, gap, width)) not in taken)
            taken.add(found[name])
    return [found[name] for name in names]


def _without_middle(name: str, gap: str, width: int) -> str:
    room = width - cell_len(gap)
    head, tail = set_cell_size(name, room // 2).rstrip(), name
    while cell_len(tail) > room - cell_len(head):
        tail = tail[1:]
    return head + gap + tail
