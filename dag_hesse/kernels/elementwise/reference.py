"""The definitions.

A node a = φ(x_1 … x_k), elementwise with broadcasting, is linearized once into first partials ``c_i = ∂φ/∂x_i`` and
λ-weighted second partials ``h_ij = λ ∂²φ/∂x_i∂x_j``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.elementwise.coefficients import Coefficient, Gate, lift, reduce_to


def _dense(c: Coefficient) -> Tensor | float:
    return c.dense() if isinstance(c, Gate) else c


def tangent(
    arena: Arena, partials: Sequence[Coefficient | None], tangents: Mapping[int, Tensor], shape: Sequence[int]
) -> Tensor:
    """ȧ = Σ_i c_i ∘ ẋ_i, (rows, *shape)."""
    total = next(iter(tangents.values())).new_zeros(())
    for slot, xdot in tangents.items():
        c = partials[slot]
        assert c is not None
        total = total + _dense(c) * lift(xdot, len(shape))
    return total.expand(total.shape[0], *shape)


def adjoints(
    arena: Arena,
    first: Sequence[Coefficient | None],
    seconds: Mapping[tuple[int, int], Coefficient],
    abar: Tensor | None,
    tangents: Mapping[int, Tensor],
    rows: slice,
    shapes: Mapping[int, Sequence[int]],
    out_shape: Sequence[int],
) -> dict[int, Tensor]:
    """Per slot in ``shapes``, c_i ∘ ā and, in its ``rows``, Σ_j h_ij ∘ ẋ_j, summed to that shape.

    Without ``abar`` the second term alone; slots that no tangent meets a second partial of are left out then.
    """
    found = {}
    for slot, shape in shapes.items():
        met = [(seconds[slot, j], x) for j, x in tangents.items() if (slot, j) in seconds]
        terms = [reduce_to((_dense(h) * lift(x, len(out_shape))).expand(-1, *out_shape), shape) for h, x in met]
        if abar is not None:
            c = first[slot]
            assert c is not None
            found[slot] = reduce_to(_dense(c) * abar, shape).clone()
            for term in terms:
                found[slot][rows] += term
        elif terms:
            found[slot] = torch.stack(terms).sum(0)
    return found
