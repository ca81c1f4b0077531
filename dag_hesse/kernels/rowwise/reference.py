"""The definitions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dag_hesse.kernels.arena import Arena


def softmax(arena: Arena, y: Tensor, g: Tensor, dims: list[int]) -> Tensor:
    """y ∘ (g − ⟨y,g⟩) of g (rows, *y), with sums over ``dims``, counted from the end."""
    return y * (g - (y * g).sum(dims, keepdim=True))


def standardize(
    arena: Arena, y: Tensor, r: Tensor, g: Tensor, dims: list[int], center: bool, inner: Sequence[int] | None
) -> Tensor:
    """r (P g − y⟨y,g⟩) with means over ``dims``; P takes the mean off where there is a ``center``.

    ``inner``: sizes of the trailing axes, where the standardization is a LayerNorm over them.
    """
    centered = g - g.mean(dims, keepdim=True) if center else g
    return r * (centered - y * (y * g).mean(dims, keepdim=True))
