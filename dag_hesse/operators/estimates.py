"""Trace and diagonal of an operator: exact where it is small, else by random signs, a chunk of vectors at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dag_hesse.errors import OptionError, flag, integer
from dag_hesse.operators.vectors import VectorForm

_USUAL = 64


class Square(Protocol):
    """What has a trace: an operator, or a block whose sides are divided alike."""

    form: VectorForm

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def chunk(self) -> int: ...

    def _products(self, segments: list[Tensor]) -> list[Tensor]: ...


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


class Estimate(NamedTuple):
    """What was found, and its standard error: both (), or both (n,).

    Attributes:
        value: exact or estimated.
        stderr: 0 where exact.
    """

    value: Tensor
    stderr: Tensor


def trace(operator: Square, matvecs: int | None, seed: int, return_stderr: bool) -> Tensor | Estimate:
    """Σ_i H_ii, or the mean of zᵀ H z over random signs z (Hutchinson)."""
    count, exact = _count(operator, matvecs)
    chunks = [torch.stack([x.sum(1) for x in own]).sum(0) for own in _terms(operator, count, exact, seed)]
    values = torch.cat(chunks)
    if exact:
        return answered(values.sum(), return_stderr)
    return answered(values.mean(), return_stderr, values.std() / sqrt(count))


def diagonal(operator: Square, matvecs: int | None, seed: int, return_stderr: bool) -> Tensor | Estimate:
    """The H_ii, or the mean of z ∘ H z over random signs z."""
    count, exact = _count(operator, matvecs)
    total = squares = torch.zeros(operator.shape[0], dtype=operator.dtype, device=operator.device)
    for own in _terms(operator, count, exact, seed):
        rows = torch.cat(own, dim=1)
        total, squares = total + rows.sum(0), squares + rows.square().sum(0)
    if exact:
        return answered(total, return_stderr)
    spread = (squares / count - (total / count) ** 2).clamp_min(0) / (count - 1)
    return answered(total / count, return_stderr, spread.sqrt())


def answered(value: Tensor, return_stderr: bool, stderr: Tensor | None = None) -> Tensor | Estimate:
    """The value, with its standard error where that is wanted; None: it is exact.

    Raises:
        OptionError: ``return_stderr`` is neither True nor False.
    """
    error = torch.zeros_like(value) if stderr is None else stderr
    return Estimate(value, error) if flag("return_stderr", return_stderr) else value


def _terms(operator: Square, count: int, exact: bool, seed: int) -> Iterator[list[Tensor]]:
    """Per segment, z ∘ H z for a chunk of vectors (k, size)."""
    for z in _units(operator) if exact else _signs(operator, count, seed):
        yield [a * b for a, b in zip(z, operator._products(z), strict=True)]


def _count(operator: Square, matvecs: int | None) -> tuple[int, bool]:
    """How many products are taken, and whether they are of all unit vectors."""
    size = operator.shape[0]
    if matvecs is not None:
        return checked_count("matvecs", matvecs, size), False
    return min(size, _USUAL), size <= _USUAL


def _units(operator: Square) -> Iterator[list[Tensor]]:
    """Unit vectors by segments, a chunk at a time."""
    size = operator.shape[0]
    for start in range(0, size, operator.chunk):
        rows = torch.zeros(min(operator.chunk, size - start), size, dtype=operator.dtype, device=operator.device)
        rows.diagonal(start).fill_(1.0)
        yield list(rows.split(operator.form.sizes, dim=1))


def _signs(operator: Square, count: int, seed: int) -> Iterator[list[Tensor]]:
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
