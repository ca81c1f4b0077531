"""A stored matrix as text: what it takes, how far it is off, and a table of its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len

from dag_hesse.budget import human
from dag_hesse.storage.pairs import Storage, decay_rate, radius_by_rate

if TYPE_CHECKING:
    from dag_hesse.storage.matrix import BlockMatrix

_ROWS = 160  # of the table of blocks; the rest is counted


def needed(history: Sequence[tuple[int, float]], target: float) -> int | None:
    """Directions at which the error would come down to ``target``, if it goes on as in the last doubling.

    >>> needed([(16, 0.4), (32, 0.2)], 0.05)
    128
    """
    if len(history) < 2 or target <= 0:
        return None
    (a, before), (b, after) = history[-2:]
    if not (after < 0.95 * before and b > a):
        return None
    slope = log(before / after) / log(b / a)
    return round(b * (after / target) ** (1 / slope)) if after else b


def lines(matrix: BlockMatrix) -> list[str]:
    """What stands above the tables."""
    f, size = matrix.facts, matrix.shape[0]
    entries = matrix.groups * sum(d for d in matrix.cores.dims) ** 2
    norm = f["size"] or 1.0
    found = [
        f"{_TITLES[f['part']]}: {len(matrix.names)} points, {size} rows, {matrix.dtype}, {human(matrix.bytes)} "
        f"(dense: {human(entries * matrix.dtype.itemsize)})",
        f"route: {f['route']}, {_effort(f)}, {f['seconds']:.2f} s; ‖H‖_F = {f['size']:.4g}",
        f"error: {f['error']:.2e} of ‖H‖_F; at most {f['bound'] / norm:.2e}"
        + (f" but with probability {f['risk']:.0e} a point" if f["risk"] else ""),
    ]
    if f["band"] is not None:
        rest = sum(facts.kind is Storage.LIVE for facts in matrix.pairs.values())
        after = f"{rest} pairs are live" if rest else f"dropped: at most {f['dropped'] / norm:.2e} of ‖H‖_F"
        found.append(f"band: distance ≤ {f['band']}; {after}")
    if f.get("eps") is not None:  # files of older versions do not say
        found.append(_radius(matrix))
    if f["target"] and f["error"] > f["target"]:
        found.append(_unmet(matrix))
    return [*found, _cost(matrix)]


_TITLES = {"full": "Hessian", "gn": "Gauss–Newton part", "tensor": "tensor part"}


def _effort(facts: Mapping[str, Any]) -> str:
    return f"{facts['pullbacks']} pullbacks" if facts["pullbacks"] else f"{facts['sweeps']} sweeps"


def _radius(matrix: BlockMatrix) -> str:
    """k_ε as measured, and by the paper's formula (Definition 79) from the mean decay of the blocks' norms."""
    f, pairs = matrix.facts, matrix.pairs
    rate, own = decay_rate(pairs), np.array([x.norm for (v, w), x in pairs.items() if v == w])
    start = f"interaction radius for ε = {f['eps']:g}: {f['band']} as measured"
    if rate is None:
        return start
    found = radius_by_rate(own, f["eps"], rate)
    by = "none by the paper's formula" if found is None else f"{found} by the paper's formula"
    return f"{start}; {by}, from a factor of {rate:.3g} a step"


def _unmet(matrix: BlockMatrix) -> str:
    f = matrix.facts
    count, start = needed(f["history"], f["target"]), f"target {f['target']:.1e}: not met"
    if count is None:
        return f"{start}, and the error hardly falls with more directions"
    size = count * sum(matrix.cores.dims) * matrix.groups * matrix.dtype.itemsize
    return f"{start}; about {count} directions a point, {human(size)}, if the error goes on to fall as it did"


def _cost(matrix: BlockMatrix) -> str:
    """The paper's O(n·k_ε·d·r), in numbers (Remark 95)."""
    cores, count = matrix.cores, len(matrix.names)
    width = sum(1 if v == w else 2 for v, w in cores.cores) / max(1, count)
    d = sum(cores.dims) / max(1, count)
    r = sum(min(cores.rank(v), cores.rank(w)) for v, w in cores.cores) / max(1, len(cores.cores))
    flops = (
        2
        * matrix.groups
        * (
            sum(2 * dim * cores.rank(v) for v, dim in enumerate(cores.dims) if cores.bases[v] is not None)
            + sum((1 if v == w else 2) * cores.rank(v) * cores.rank(w) for v, w in cores.cores)
        )
    )
    return (
        f"n·k·d·r: {count} points × {width:.1f} blocks a row × {d:.0f} rows × rank {r:.1f} = "
        f"{count * width * d * r:.3g}; bases are shared: {flops:.3g} FLOP a product"
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: the first two to the left, the rest to the right."""
    widths = [max(cell_len(row[k]) for row in rows) for k in range(len(rows[0]))]
    found = []
    for row in rows:
        gaps = [" " * (width - cell_len(text)) for width, text in zip(widths, row, strict=True)]
        cells = [text + gap if k < 2 else gap + text for k, (text, gap) in enumerate(zip(row, gaps, strict=True))]
        found.append("  ".join(cells).rstrip())
    return found


def render(matrix: BlockMatrix) -> str:
    """The whole text."""
    cores, names = matrix.cores, matrix.names
    points = [("point", "stored by", "d", "directions", "bytes")]
    for v, name in enumerate(names):
        basis = cores.bases[v]
        by, size = ("coordinates", 0) if basis is None else ("basis", basis.numel() * basis.element_size())
        points.append((name, by, str(cores.dims[v]), str(cores.rank(v)), human(size)))
    blocks = [("v", "w", "distance", "kind", "rank", "bytes", "‖H‖_F", "error ≤")]
    for (v, w), facts in list(matrix.pairs.items())[:_ROWS]:
        block = matrix[v, w]
        rank = "-" if block.rank is None else str(block.rank)
        numbers = (rank, human(block.bytes), f"{facts.norm:.3g}", f"{facts.error:.2g}")
        blocks.append((names[v], names[w], str(facts.distance), facts.kind.value, *numbers))
    left = len(matrix.pairs) - _ROWS
    more = [f"… {left} pairs more"] if left > 0 else []
    reasons = sorted({facts.reason for facts in matrix.pairs.values() if facts.reason})
    why = [f"not stored: {', '.join(reasons)}"] if reasons else []
    return "\n".join([*lines(matrix), "", *table(points), "", *table(blocks), *more, *why])
