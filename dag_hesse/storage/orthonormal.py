"""Tall matrices as orthonormal columns times a triangle, in few passes over memory."""

from __future__ import annotations

import torch
from torch import Tensor

_TALL = 32  # rows per column from which Cholesky beats Householder
_PIECE = 1 << 16  # rows that are taken to double precision together


def orthonormal(x: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, R) with Q R = x, Qᵀ Q = I and R upper triangular, of x (groups, d, r).

    Cholesky factors of Gram matrices in double precision, twice (CholeskyQR2; Yamamoto et al. 2015); Householder's
    reflections where x is not tall, or its columns are nearly dependent.

    >>> import torch
    >>> x = torch.randn(1, 500, 3, generator=torch.Generator().manual_seed(0))
    >>> q, r = orthonormal(x)
    >>> bool(torch.allclose(q @ r, x, atol=1e-5)), bool(torch.allclose(q.mT @ q, torch.eye(3), atol=1e-5))
    (True, True)
    """
    if x.shape[-2] < _TALL * x.shape[-1]:
        return torch.linalg.qr(x)
    q, eye = x, torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    r = eye
    for again in (False, True):
        gram = _gram(q)
        factor, info = torch.linalg.cholesky_ex(gram)
        if bool((info != 0).any()) or (again and not bool((gram - eye).abs().amax() < 0.1)):
            return torch.linalg.qr(x)
        q = q @ torch.linalg.solve_triangular(factor.mT, eye.expand_as(factor), upper=True).to(q.dtype)
        r = factor.mT @ r
    return q, r.to(x.dtype)


def _gram(x: Tensor) -> Tensor:
    """xᵀ x in double precision."""
    pieces = (piece.double() for piece in x.split(_PIECE, dim=-2))
    return torch.stack([piece.mT @ piece for piece in pieces]).sum(0)
