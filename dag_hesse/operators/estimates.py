"""Trace and diagonal of an operator: exact where it is small, else by random signs, a chunk of vectors at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dag_hesse.errors import OptionError, integer

if TYPE_CHECKING:
    from dag_hesse.operators.base import SymmetricOperator

_USUAL = 64


def checked_count(name: str, count: object, size: int, least: int = 2) -> int:
    """``count`` as an int from ``least`` to ``size`` - 1.

    Raises:
        OptionError: it is none.
    """
    number = integer(name, count)
    if not least <= number < size:
        more = " With as many products as rows dense() is exact." if number >= size else ""
        raise OptionError(
            f"{name}={number}; expected at least {least} and fewer than the operator's {size} rows.{more}"
        )
    return number


def trace(operator: SymmetricOperator, matvecs: int | None, seed: int) -> Tensor:
    """Σ_i H_ii, or the mean of zᵀ H z over random signs z (Hutchinson)."""
    total = torch.zeros((), dtype=operator.dtype, device=operator.device)
    count, exact = _count(operator, matvecs)
    for z in _units(operator) if exact else _signs(operator, count, seed):
        total += sum((a * b).sum() for a, b in zip(z, operator._products(z), strict=True))
    return total if exact else total / count


def diagonal(operator: SymmetricOperator, matvecs: int | None, seed: int) -> Tensor:
    """The H_ii, or the mean of z ∘ H z over random signs z."""
    count, exact = _count(operator, matvecs)
    total = torch.zeros(operator.shape[0], dtype=operator.dtype, device=operator.device)
    for z in _units(operator) if exact else _signs(operator, count, seed):
        parts = [(a * b).sum(0) for a, b in zip(z, operator._products(z), strict=True)]
        total += torch.cat(parts)
    return total if exact else total / count


def _count(operator: SymmetricOperator, matvecs: int | None) -> tuple[int, bool]:
    """How many products are taken, and whether they are of all unit vectors."""
    size = operator.shape[0]
    if matvecs is not None:
        return checked_count("matvecs", matvecs, size), False
    return min(size, _USUAL), size <= _USUAL


def _units(operator: SymmetricOperator) -> Iterator[list[Tensor]]:
    """Unit vectors by segments, a chunk at a time."""
    size = operator.shape[0]
    for start in range(0, size, operator.chunk):
        rows = torch.zeros(min(operator.chunk, size - start), size, dtype=operator.dtype, device=operator.device)
        rows.diagonal(start).fill_(1.0)
        yield list(rows.split(operator.form.sizes, dim=1))


def _signs(operator: SymmetricOperator, count: int, seed: int) -> Iterator[list[Tensor]]:
    """Random signs by segments, a chunk at a time. They do not hang on how large chunks are, nor on the device."""
    generator, left = torch.Generator().manual_seed(integer("seed", seed)), count
    while left:
        now = min(operator.chunk, left)
        rows = torch.empty(now, operator.shape[0], dtype=torch.int8, device="cpu")
        for row in rows:
            row.random_(0, 2, generator=generator)
        signs = (2 * rows - 1).to(dtype=operator.dtype, device=operator.device)
        yield list(signs.split(operator.form.sizes, dim=1))
        left -= now
