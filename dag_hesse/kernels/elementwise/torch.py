"""In as few passes over memory as PyTorch has, in the arena's memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, plus_term
from dag_hesse.kernels.elementwise.coefficients import (
    Adjoint,
    Coefficient,
    Coefficients,
    add_times,
    lift,
    plus_times,
    reduce_to,
    times,
)


def tangent(arena: Arena, of: Coefficients, tangents: Mapping[int, Tensor]) -> Tensor:
    return _sum(arena, ((of.first[slot], x) for slot, x in tangents.items()), of.shape)


def _sum(arena: Arena, terms: Iterable[tuple[Coefficient | None, Tensor]], shape: Sequence[int]) -> Tensor:
    total: Tensor | None = None
    for c, xdot in terms:
        x = lift(xdot, len(shape))
        assert c is not None
        total = times(arena, c, x) if total is None else plus_times(arena, total, c, x)
    assert total is not None
    return total.expand(total.shape[0], *shape)


def adjoints(arena: Arena, of: Coefficients, a: Adjoint) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for slot, shape in a.wanted.items():
        met = [(of.seconds[slot, other], x) for other, x in a.tangents.items() if (slot, other) in of.seconds]
        second = partial(_second_order, arena, met, shape, of.shape)
        if a.abar is None:
            term = second(None)
            if term is not None:
                found[slot] = term
            continue
        c = of.first[slot]
        assert c is not None
        x = transpose(arena, c, a.abar, shape)
        found[slot] = plus_term(x, a.abar, a.rows, second) if a.tangents else x
    return found


def transpose(arena: Arena, partial: Coefficient, abar: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x̄_i = c_i ∘ ā summed to the input's ``shape``."""
    return reduce_to(times(arena, partial, abar), shape)


def _second_order(
    arena: Arena,
    met: Sequence[tuple[Coefficient, Tensor]],
    shape: Sequence[int],
    out_shape: Sequence[int],
    into: Tensor | None = None,
) -> Tensor | None:
    """Σ_j h_ij ∘ ẋ_j summed to input i's ``shape``, added to ``into`` where that is given; None without terms."""
    if not met:
        return None
    if into is not None and torch.Size(shape) == torch.Size(out_shape):
        for h, x in met:
            add_times(arena, into, h, lift(x, len(out_shape)))
        return into
    found = reduce_to(_sum(arena, met, out_shape), shape)
    return found if into is None else into.add_(found)
