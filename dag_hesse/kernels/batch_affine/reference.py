"""The definition."""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena


def spread(numbers: Tensor, ndim: int) -> Tensor:
    """(rows, channels) -> a shape that broadcasts against (rows, batch, channels, …) of so many axes."""
    return numbers.reshape(len(numbers), 1, -1, *(1,) * (ndim - 3))


def sums(arena: Arena, g: Tensor, x: Tensor, mean: Tensor, r: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(Σ g (x − mean) r, Σ g) per image channel, (rows, channels): sums over all axes but these two.

    g and x are (rows, batch, channels, …), one of them perhaps with a single row for all; r = (var + eps)^-½.
    """
    rows = max(len(g), len(x))
    g, over = g.expand(rows, *g.shape[1:]), [1, *range(3, g.ndim)]
    turned = g * (x - mean.reshape(-1, *(1,) * (x.ndim - 3)))
    return torch.sum(turned, over) * r, torch.sum(g, over)


def tangent(
    arena: Arena, gain: Tensor, xdot: Tensor | None, x: Tensor, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """gain ẋ + x scale + shift, (rows, *x): gain is (channels), scale and shift are (rows, channels), ẋ (rows, *x)."""
    terms = [] if xdot is None else [xdot * spread(gain[None], xdot.ndim)]
    terms += [] if scale is None else [x * spread(scale, x.ndim + 1)]
    terms += [] if shift is None else [spread(shift, x.ndim + 1)]
    total = sum(terms[1:], start=terms[0])
    return total.expand(len(total), *x.shape)


def adjoint(
    arena: Arena, gain: Tensor, abar: Tensor | None, lam: Tensor | None, share: Tensor | None, rows: slice
) -> Tensor:
    """gain ā, (rows, *x), and in some ``rows`` λ share beside it: λ is (1, *x), share (those rows, channels)."""
    term = None if lam is None or share is None else lam * spread(share, lam.ndim)
    if abar is None:
        assert term is not None
        return term
    found = abar * spread(gain[None], abar.ndim)
    if term is not None:
        found[rows] = found[rows] + term
    return found
