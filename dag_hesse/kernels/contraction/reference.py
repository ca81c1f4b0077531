"""The definitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena


def product(arena: Arena, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    """a @ b of (rows, …, n, k) and (rows, …, k, m), added to ``into`` where that is given."""
    found = torch.matmul(a, b)
    return found if into is None else into.add_(found)


def outer(arena: Arena, terms: Sequence[tuple[Tensor, Tensor]], turned: bool, into: Tensor | None) -> Tensor:
    """Σ aᵀ @ g over ``terms`` (g, a), added to ``into``; ``turned``: laid out as the transpose of what it is."""
    for g, a in terms:
        found = torch.matmul(a.mT, g)
        into = found if into is None else into.add_(found)
    assert into is not None
    return into
