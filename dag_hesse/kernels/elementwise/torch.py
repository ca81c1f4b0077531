"""In as few passes over memory as PyTorch has, in the arena's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, plus_term
from dag_hesse.kernels.elementwise.coefficients import Coefficient, add_times, lift, plus_times, reduce_to, times

Seconds = Mapping[tuple[int, int], Coefficient]


def tangent(
    arena: Arena, partials: Sequence[Coefficient | None], tangents: Mapping[int, Tensor], shape: Sequence[int]
) -> Tensor:
    """Return ȧ = Σ_i c_i ∘ ẋ_i of shape (probes, *shape)."""
    total: Tensor | None = None
    for slot, xdot in tangents.items():
        c, x = partials[slot], lift(xdot, len(shape))
        assert c is not None
        total = times(arena, c, x) if total is None else plus_times(arena, total, c, x)
    assert total is not None
    return total.expand(total.shape[0], *shape)


def adjoints(
    arena: Arena,
    first: Sequence[Coefficient | None],
    seconds: Seconds,
    abar: Tensor | None,
    tangents: Mapping[int, Tensor],
    rows: slice,
    shapes: Mapping[int, Sequence[int]],
    out_shape: Sequence[int],
) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for slot, shape in shapes.items():
        second = partial(_second_order, arena, seconds, tangents, slot, shape, out_shape)
        if abar is None:
            term = second(None)
            if term is not None:
                found[slot] = term
            continue
        c = first[slot]
        assert c is not None
        x = transpose(arena, c, abar, shape)
        found[slot] = plus_term(x, abar, rows, second) if tangents else x
    return found


def transpose(arena: Arena, partial: Coefficient, abar: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x̄_i = c_i ∘ ā summed to the input's ``shape``."""
    return reduce_to(times(arena, partial, abar), shape)


def _second_order(
    arena: Arena,
    seconds: Mapping[tuple[int, int], Coefficient],
    tangents: Mapping[int, Tensor],
    slot: int,
    shape: Sequence[int],
    out_shape: Sequence[int],
    into: Tensor | None = None,
) -> Tensor | None:
    """Σ_j h_ij ∘ ẋ_j summed to input i's ``shape``, added to ``into`` where that is given.

    None where no tangent meets a second partial.
    """
    row = {other: xdot for other, xdot in tangents.items() if (slot, other) in seconds}
    if not row:
        return None
    if into is not None and torch.Size(shape) == torch.Size(out_shape):
        for other, xdot in row.items():
            add_times(arena, into, seconds[slot, other], lift(xdot, len(out_shape)))
        return into
    partials = [seconds.get((slot, other)) for other in range(max(row) + 1)]
    found = reduce_to(tangent(arena, partials, row, out_shape), shape)
    return found if into is None else into.add_(found)
