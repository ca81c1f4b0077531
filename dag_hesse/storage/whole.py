"""A stored matrix as one tensor, and its diagonal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dag_hesse.budget import human
from dag_hesse.errors import MemoryBudgetError
from dag_hesse.measure import available_memory

if TYPE_CHECKING:
    from dag_hesse.storage.matrix import BlockMatrix


def dense_of(matrix: BlockMatrix) -> Tensor:
    """As :meth:`dag_hesse.BlockMatrix.to_dense`."""
    rows, points = matrix.shape[0], range(len(matrix.names))
    need, budget = rows**2 * matrix.dtype.itemsize, available_memory(matrix.device) // 2
    if need > budget:
        raise MemoryBudgetError(
            f"to_dense() of {rows} rows needs {human(need)} and {human(budget)} may be used: "
            "multiply with vectors instead, or take B[v, w].dense()."
        )
    found = torch.empty(rows, rows, dtype=matrix.dtype, device=matrix.device)
    strips = [strip.split(matrix.form.sizes, dim=1) for strip in found.split(matrix.form.sizes)]
    for v in points:
        for w in points[v:]:
            block = matrix[v, w].dense()
            strips[v][w].copy_(block)
            if v != w:
                strips[w][v].copy_(block.T)
    return found


def diagonal_of(matrix: BlockMatrix) -> Tensor:
    """As :meth:`dag_hesse.BlockMatrix.diagonal`."""
    found = torch.zeros(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    for v, piece in enumerate(found.split(matrix.form.sizes)):
        if (own := matrix.cores.diagonal(v)) is not None:
            piece.copy_(own.flatten())
    return found
