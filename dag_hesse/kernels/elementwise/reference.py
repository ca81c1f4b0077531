"""The definitions.

A node a = φ(x_1 … x_k), elementwise with broadcasting, is linearized once into first partials ``c_i = ∂φ/∂x_i`` and
λ-weighted second partials ``h_ij = λ ∂²φ/∂x_i∂x_j``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.elementwise.coefficients import Adjoint, Coefficient, Coefficients, Gate, lift, reduce_to


def _dense(c: Coefficient) -> Tensor | float:
    return c.dense() if isinstance(c, Gate) else c


def tangent(arena: Arena, of: Coefficients, tangents: Mapping[int, Tensor]) -> Tensor:
    """ȧ = Σ_i c_i ∘ ẋ_i, (rows, *shape)."""
    total = next(iter(tangents.values())).new_zeros(())
    for slot, xdot in tangents.items():
        c = of.first[slot]
        assert c is not None
        total = total + _dense(c) * lift(xdot, len(of.shape))
    return total.expand(total.shape[0], *of.shape)


def adjoints(arena: Arena, of: Coefficients, a: Adjoint) -> dict[int, Tensor]:
    """Per wanted slot, c_i ∘ ā and, in its ``rows``, Σ_j h_ij ∘ ẋ_j, summed to the input's shape.

    Without ā, slots that no tangent meets a second partial of are left out.
    """
    found = {}
    for slot, shape in a.wanted.items():
        met = [(of.seconds[slot, j], x) for j, x in a.tangents.items() if (slot, j) in of.seconds]
        terms = [reduce_to((_dense(h) * lift(x, len(of.shape))).expand(-1, *of.shape), shape) for h, x in met]
        if a.abar is not None:
            c = of.first[slot]
            assert c is not None
            found[slot] = reduce_to(_dense(c) * a.abar, shape).clone()
            for term in terms:
                found[slot][a.rows] += term
        elif terms:
            found[slot] = torch.stack(terms).sum(0)
    return found
