"""Picture of a stored matrix (matplotlib, an optional extra)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dag_hesse.figures import new_figure, save_figure
from dag_hesse.storage.pairs import Storage

if TYPE_CHECKING:
    from dag_hesse.storage.matrix import BlockMatrix

_COLOURS = {Storage.ZERO: "#eeeeee", Storage.DENSE: "#2a6f97", Storage.LOW_RANK: "#61a5c2", Storage.LIVE: "#e09f3e"}


def overview(matrix: BlockMatrix, path: str | Path | None = None) -> Any:
    """How blocks are stored, with their ranks; singular values of the diagonal blocks."""
    side = max(3.6, 0.42 * len(matrix.names))
    figure = new_figure(figsize=(2 * side + 1.4, side + 0.6))
    left, right = figure.subplots(1, 2)
    _kinds(left, matrix)
    _values(right, matrix)
    if path is not None:
        save_figure(figure, path)
    return figure


def _kinds(axes: Any, matrix: BlockMatrix) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    count, ticks = len(matrix.names), range(len(matrix.names))
    kinds = [[matrix.facts_of(v, w).kind for w in ticks] for v in ticks]
    axes.imshow(np.array([[to_rgb(_COLOURS[kind]) for kind in row] for row in kinds]))
    if count <= 12:
        for v in ticks:
            for w in ticks:
                if rank := matrix[v, w].rank:
                    axes.text(w, v, str(rank), ha="center", va="center", fontsize=7, color="white")
    axes.set_xticks(ticks, matrix.names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(ticks, matrix.names, fontsize=8)
    used = [kind for kind in _COLOURS if any(kind in row for row in kinds)]
    axes.legend(handles=[Patch(color=_COLOURS[k], label=k.value) for k in used], fontsize=7, loc="upper right")
    axes.set_title("stored as (number: rank)", fontsize=10)


def _values(axes: Any, matrix: BlockMatrix) -> None:
    for v, name in enumerate(matrix.names):
        values = matrix[v, v].singular_values()
        if bool((values > 0).any()):
            shown = values[values > values.max() * 1e-12]
            axes.semilogy(np.arange(1, len(shown) + 1), shown.cpu().numpy(), lw=1, marker=".", ms=3, label=name)
    axes.set_title("singular values of diagonal blocks", fontsize=10)
    axes.set_xlabel("number", fontsize=8)
    axes.tick_params(labelsize=8)
    if len(matrix.names) <= 12 and axes.lines:
        axes.legend(fontsize=7)
