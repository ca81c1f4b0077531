"""Exact norms of every sample's blocks, a chunk of unit vectors at a time: no block is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dag_hesse.sweep import Request
from dag_hesse.theory.scene import Scene

_CHUNK = 64


@dataclass(frozen=True)
class BlockNorms:
    """‖H‖_F and ‖H_GN‖_F of every pair and sample, (n, n, B)."""

    full: NDArray[np.float64]
    gn: NDArray[np.float64]


def block_norms(scene: Scene) -> BlockNorms:
    """Identity probes from every point, read at those before it (blocks are symmetric)."""
    problem, count = scene.problem, len(scene.points)
    squares = np.zeros((2, count, count, problem.groups))
    for w in range(count):
        eye = torch.eye(problem.dim(w), dtype=problem.dtype, device=problem.device)[:, None, :]
        for piece in eye.expand(-1, problem.groups, -1).split(_CHUNK):
            for v, parts in problem.run([Request({w: piece}, tuple(range(w + 1)))])[0].items():
                for k, x in enumerate((parts.full, parts.gn)):
                    squares[k, v, w] += _squares(x)
    lower = np.tril_indices(count, -1)
    squares[:, lower[0], lower[1]] = squares[:, lower[1], lower[0]]
    return BlockNorms(*np.sqrt(squares))


def _squares(x: Tensor | None) -> NDArray[np.float64] | float:
    return 0.0 if x is None else x.double().pow(2).sum((0, 2)).cpu().numpy()
