"""The definition."""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena


def sums(arena: Arena, g: Tensor, x: Tensor, mean: Tensor, r: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(Σ g (x − mean) r, Σ g) per image channel, (rows, channels): sums over all axes but these two.

    g and x are (rows, batch, channels, …), one of them perhaps with a single row for all; r = (var + eps)^-½.
    """
    rows = max(len(g), len(x))
    g, over = g.expand(rows, *g.shape[1:]), [1, *range(3, g.ndim)]
    turned = g * (x - mean.reshape(-1, *(1,) * (x.ndim - 3)))
    return torch.sum(turned, over) * r, torch.sum(g, over)
