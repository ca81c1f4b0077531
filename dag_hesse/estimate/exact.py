"""Exact blocks by identity probes, from the side the plan chose."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from dag_hesse.estimate.norms import NormTable
from dag_hesse.sweep import Parts, Problem, Request

_DENSE = 32


def identity(problem: Problem, source: int) -> Tensor:
    """Unit vectors (dim, groups, dim) of a point: every group's at once."""
    dim = problem.dim(source)
    eye = torch.eye(dim, dtype=problem.dtype, device=problem.device)
    return eye[:, None, :].expand(dim, problem.groups, dim)


def exact_blocks(
    problem: Problem, source: int, reads: tuple[int, ...], progress: Callable[[int], None] | None = None
) -> dict[int, Parts]:
    """Blocks H[v, source] for v in ``reads``: tensors (d_source, groups, d_v), None where nothing reaches v."""
    return problem.run([Request({source: identity(problem, source)}, reads)], progress=progress)[0]


def squares(block: Tensor | None, groups: int) -> np.ndarray:
    """Squared Frobenius norm per group."""
    if block is None:
        return np.zeros(groups)
    return block.double().pow(2).sum((0, 2)).cpu().numpy()


def spectral_norm(matrix: Tensor) -> float:
    """Largest singular value: dense for small matrices, Lanczos to machine precision for large ones.

    Products are PyTorch's: other libraries' threads and its own wait for each other.
    """
    wide = matrix.double().cpu()
    wide = wide if len(wide) <= wide.shape[1] else wide.mT
    scale = float(torch.linalg.vector_norm(wide, inf)) if wide.numel() else 0.0
    if not 0 < scale < inf:
        return scale
    if len(wide) <= _DENSE:
        return float(torch.linalg.matrix_norm(wide, 2))

    def product(x: np.ndarray) -> np.ndarray:  # of a matrix of unit size: Lanczos converges to so much of 1
        return (wide @ (wide.mT @ torch.from_numpy(x) / scale) / scale).numpy()

    start = np.random.default_rng(0).standard_normal(len(wide))
    operator = LinearOperator((len(wide),) * 2, matvec=product, dtype=np.float64)
    return scale * float(eigsh(operator, k=1, tol=0, v0=start, return_eigenvectors=False)[0]) ** 0.5


def enter(problem: Problem, table: NormTable, source: int, blocks: dict[int, Parts]) -> None:
    """Enter the norms of exact blocks into the table."""
    for v, block in blocks.items():
        pair = (min(v, source), max(v, source))
        for part, tensor in (("full", block.full), ("gn", block.gn), ("tensor", block.tensor)):
            if pair not in table.frobenius[part]:  # the Gram route may have been there
                table.set_exact(part, pair, squares(tensor, problem.groups))
        if block.full is None:
            values = np.zeros(problem.groups)
        else:
            values = np.array([spectral_norm(block.full[:, g]) for g in range(problem.groups)])
        table.spectral[pair] = (values, np.zeros(problem.groups))
