"""Trace and diagonal of an operator: exact where it is small, else by random signs, with or without a sketch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import sqrt

import torch
from torch import Tensor

from dag_hesse.errors import OptionError, choose, integer
from dag_hesse.operators.deflated import LEAST, OF_DIAGONAL, OF_TRACE, sketch_bytes
from dag_hesse.operators.estimates import USUAL, Estimate, Square, answered, checked_count, computed_in, signs, units

Method = Callable[[Square, int, int], Estimate]


def trace(
    operator: Square, matvecs: int | None, seed: int, return_stderr: bool, method: str = "hutchinson"
) -> Tensor | Estimate:
    """Σ_i H_ii, or an estimate of it."""
    if (other := _otherwise(operator, matvecs, seed, method, OF_TRACE)) is not None:
        return answered(other.value, return_stderr, other.stderr)
    count, exact = _count(operator, matvecs, method)
    chunks = [torch.stack([x.sum(1) for x in own]).sum(0) for own in _terms(operator, count, exact, seed)]
    values = torch.cat(chunks)
    if exact:
        return answered(values.sum(), return_stderr)
    return answered(values.mean(), return_stderr, values.std() / sqrt(count))


def diagonal(
    operator: Square, matvecs: int | None, seed: int, return_stderr: bool, method: str = "hutchinson"
) -> Tensor | Estimate:
    """The H_ii, or an estimate of them."""
    if (other := _otherwise(operator, matvecs, seed, method, OF_DIAGONAL)) is not None:
        return answered(other.value, return_stderr, other.stderr)
    count, exact = _count(operator, matvecs, method)
    total = squares = torch.zeros(operator.shape[0], dtype=computed_in(operator.dtype), device=operator.device)
    for own in _terms(operator, count, exact, seed):
        rows = torch.cat(own, dim=1)
        total, squares = total + rows.sum(0), squares + rows.square().sum(0)
    if exact:
        return answered(total, return_stderr)
    spread = (squares / count - (total / count) ** 2).clamp_min(0) / (count - 1)
    return answered(total / count, return_stderr, spread.sqrt())


def _otherwise(
    operator: Square, matvecs: int | None, seed: int, method: str, methods: Mapping[str, Method]
) -> Estimate | None:
    """What a method with a sketch finds; None where signs alone, or all unit vectors, are meant.

    Raises:
        OptionError: there is no such method, or ``matvecs`` is too small for it.
        MemoryBudgetError: its sketch would not fit.
    """
    choose("method", method, ("hutchinson", *methods, "exact"))
    seed = integer("seed", seed)
    size = operator.shape[0]
    if method not in methods or (matvecs is None and size <= USUAL):
        return None
    count = USUAL if matvecs is None else checked_count("matvecs", matvecs, size, LEAST[method])
    what = f"a sketch of {size} rows by {count} products"
    operator._check_room(sketch_bytes(operator, count), what, "take fewer matvecs=, or method='hutchinson'")
    return methods[method](operator, count, seed)


def _terms(operator: Square, count: int, exact: bool, seed: int) -> Iterator[list[Tensor]]:
    """Per segment, z ∘ H z for a chunk of vectors (k, size)."""
    for z in units(operator) if exact else signs(operator, count, seed):
        wide = computed_in(operator.dtype)
        yield [a.to(wide) * b.to(wide) for a, b in zip(z, operator._products(z), strict=True)]


def _count(operator: Square, matvecs: int | None, method: str) -> tuple[int, bool]:
    """How many products are taken, and whether they are of all unit vectors."""
    size = operator.shape[0]
    if method == "exact":
        if matvecs is not None:
            raise OptionError(f"matvecs={matvecs!r}; expected None with method='exact', which takes what it needs.")
        return size, True
    if matvecs is not None:
        return checked_count("matvecs", matvecs, size), False
    return min(size, USUAL), size <= USUAL
