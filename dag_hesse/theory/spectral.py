"""Largest singular values of many maps at once, by Lanczos on MᵀM with all its vectors kept orthogonal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ROOM = 1 << 27  # numbers that the vectors kept may be; the iteration starts anew from what it found
_LEAST = 8
Map = Callable[[Tensor], Tensor]  # (samples, n) -> (samples, m), every sample by its own matrix


def largest_singular_values(
    forth: Map, back: Map, start: Tensor, tolerance: float, steps: int
) -> tuple[Tensor, Tensor]:
    """σ_max of every sample's matrix M, and how far off it may be.

    Args:
        forth, back: products with M and with Mᵀ.
        start: (samples, n), a random vector each.
        tolerance: relative residual ‖MᵀM x − σ² x‖ / σ² at which to stop.
        steps: most products with MᵀM.

    Returns:
        σ and the residual ‖MᵀM x − σ² x‖ / σ², (samples,) each. MᵀM has an eigenvalue that close to σ² (relatively);
        σ is never above σ_max, but for rounding.
    """
    width = max(_LEAST, _ROOM // start.numel())
    top, relative = torch.zeros_like(start[:, 0]), torch.full_like(start[:, 0], torch.inf)
    while steps > 0 and bool((relative > tolerance).any()):
        top, relative, start = _cycle(forth, back, start, tolerance, min(steps, width))
        steps -= width
    return top.sqrt(), relative


def _cycle(forth: Map, back: Map, start: Tensor, tolerance: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """σ², its relative residual and the vector it is of, from at most so many products."""
    basis, diagonal, beside = [start / start.norm(dim=1, keepdim=True)], list[Tensor](), list[Tensor]()
    for step in range(1, min(steps, start.shape[1]) + 1):
        x = back(forth(basis[-1]))
        diagonal.append((x * basis[-1]).sum(1))
        stacked = torch.stack(basis, dim=1)  # (samples, step, n)
        for _ in range(2):  # once leaves what rounding put back
            x = x - torch.einsum("bk,bkn->bn", torch.einsum("bkn,bn->bk", stacked, x), stacked)
        beside.append(x.norm(dim=1))
        values, vectors = torch.linalg.eigh(tridiagonal(diagonal, beside[:-1]))
        top = values[:, -1].clamp_min(0.0)
        residual = beside[-1] * vectors[:, -1, -1].abs()
        floor = torch.finfo(x.dtype).eps * top
        relative = torch.where(top > 0, residual / top.clamp_min(1e-300), torch.zeros_like(top))
        exhausted = beside[-1] <= floor * step
        if bool(((relative <= tolerance) | exhausted).all()):
            break
        unit = x / beside[-1].clamp_min(1e-300).unsqueeze(1)
        basis.append(torch.where(exhausted.unsqueeze(1), torch.zeros_like(x), unit))
    found = torch.einsum("bk,bkn->bn", vectors[:, :, -1], torch.stack(basis[: vectors.shape[1]], dim=1))
    return top, torch.where(exhausted, torch.zeros_like(relative), relative), found


def tridiagonal(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    """(samples, k, k) from k diagonals and k−1 entries beside them."""
    found = torch.diag_embed(torch.stack(diagonal, dim=1))
    if beside:
        off = torch.stack(beside, dim=1)
        found = found + torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
    return found
