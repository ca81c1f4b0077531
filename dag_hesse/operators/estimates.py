"""What estimates are made of: random signs and unit vectors, a chunk at a time; and what they give out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dag_hesse.errors import OptionError, flag, integer
from dag_hesse.operators.vectors import VectorForm

USUAL = 64


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

    def _check_room(self, need: int, what: str, instead: str) -> None: ...

    def _products(self, segments: list[Tensor]) -> list[Tensor]: ...


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What estimates are added up in: float32, where products have half the digits.

    >>> computed_in(torch.bfloat16), computed_in(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


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


def answered(value: Tensor, return_stderr: bool, stderr: Tensor | None = None) -> Tensor | Estimate:
    """The value, with its standard error where that is wanted; None: it is exact.

    Raises:
        OptionError: ``return_stderr`` is neither True nor False.
    """
    error = torch.zeros_like(value) if stderr is None else stderr
    return Estimate(value, error) if flag("return_stderr", return_stderr) else value


def units(operator: Square) -> Iterator[list[Tensor]]:
    """Unit vectors by segments, a chunk at a time."""
    size = operator.shape[0]
    for start in range(0, size, operator.chunk):
        rows = torch.zeros(min(operator.chunk, size - start), size, dtype=operator.dtype, device=operator.device)
        rows.diagonal(start).fill_(1.0)
        yield list(rows.split(operator.form.sizes, dim=1))


def signs(operator: Square, count: int, seed: int) -> Iterator[list[Tensor]]:
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
