"""Tables of results as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isnan


def cell(value: object) -> str:
    """A number in three figures; NaN is a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if isnan(value):
        return "-"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns under their heads: the first is text, the others are numbers."""
    lines = [list(head), *([cell(x) for x in row] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return "\n".join(
        "  ".join(
            x.ljust(w) if k == 0 else x.rjust(w) for k, (x, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
