"""(B + λI) x = z: a block Cholesky factorization of the cores, or MINRES."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dag_hesse.measure import available_memory
from dag_hesse.operators.solve import Solution, by_krylov, check_finite, checked_damping, residual
from dag_hesse.storage.cores import Cores, Pair
from dag_hesse.storage.pairs import Storage

if TYPE_CHECKING:
    from dag_hesse.storage.matrix import BlockMatrix


def solved(
    matrix: BlockMatrix, z: Any, damping: float = 0.0, rtol: float = 1e-6, maxiter: int | None = None
) -> Solution:
    """As :meth:`dag_hesse.BlockMatrix.solve`."""
    shift = checked_damping(damping)
    segments, unpack = matrix.form.pack(z)
    check_finite(segments)
    factors = _factors(matrix, shift)
    if factors is not None:
        x, method, steps = _by_cholesky(matrix.cores, factors, segments, shift), "cholesky", 0
    else:
        x, steps = by_krylov(matrix, segments, shift, rtol, maxiter)
        method = "minres"
    return Solution(unpack(x), residual(matrix, x, segments, shift), method, steps)


def _factors(matrix: BlockMatrix, shift: float) -> dict[Pair, Tensor] | None:
    """Lower blocks L[i, j], i ≥ j, of the cores' Cholesky factor; None where there is none, or no room for it."""
    cores = matrix.cores
    whole = all(basis is None for basis in cores.bases)  # else the rest of the space has λ alone
    if any(facts.kind is Storage.LIVE for facts in matrix.pairs.values()) or (shift == 0 and not whole):
        return None
    count = len(cores.dims)
    ranks = [cores.rank(v) for v in range(count)]
    left = {(w, v): x.mT.double() for (v, w), x in cores.cores.items()}
    first = [min((j for j in range(i + 1) if (i, j) in left), default=i) for i in range(count)]
    filled = sum(ranks[i] * sum(ranks[first[i] : i + 1]) for i in range(count))  # a row, from its first block on
    if 16 * cores.groups * filled > available_memory(matrix.device) // 2:
        return None
    for i, rank in enumerate(ranks):
        eye = torch.eye(rank, dtype=torch.float64, device=matrix.device)
        left[i, i] = left.get((i, i), torch.zeros_like(eye).expand(cores.groups, -1, -1)) + shift * eye
    return _factored(left, count)


def _factored(left: dict[Pair, Tensor], count: int) -> dict[Pair, Tensor] | None:
    """In place, column by column; None where a pivot block is not positive definite."""
    for j in range(count):
        pivot, info = torch.linalg.cholesky_ex(left[j, j])
        if bool((info != 0).any()):
            return None
        left[j, j] = pivot
        below = [i for i in range(j + 1, count) if (i, j) in left]
        for i in below:
            left[i, j] = torch.linalg.solve_triangular(pivot, left[i, j].mT, upper=False).mT
        for i in below:
            for k in below:
                if k <= i:
                    term = left[i, j] @ left[k, j].mT
                    left[i, k] = left[i, k] - term if (i, k) in left else -term
    return left


def _by_cholesky(cores: Cores, left: dict[Pair, Tensor], segments: list[Tensor], shift: float) -> list[Tensor]:
    """Substitution in the cores, and 1/λ outside the bases."""
    z = [x.reshape(len(x), cores.groups, -1) for x in segments]
    short = [cores.compress(v, x) for v, x in enumerate(z)]
    t, count = [x.mT.double() for x in short], len(z)  # (groups, r_v, k)
    for j in range(count):
        for i in range(j):
            if (j, i) in left:
                t[j] = t[j] - left[j, i] @ t[i]
        t[j] = torch.linalg.solve_triangular(left[j, j], t[j], upper=False)
    for j in reversed(range(count)):
        for i in range(j + 1, count):
            if (i, j) in left:
                t[j] = t[j] - left[i, j].mT @ t[i]
        t[j] = torch.linalg.solve_triangular(left[j, j].mT, t[j], upper=True)
    found = []
    for v, x in enumerate(z):
        y = t[v].mT.to(x.dtype)
        if cores.bases[v] is None:
            found.append(y.transpose(0, 1))
        else:
            found.append(cores.expand(v, y - short[v] / shift) + x / shift)
    return [x.reshape(len(x), -1) for x in found]
