"""The definitions. Probes lie in front: (rows, *x). Sums and means go over ``dims``, counted from the end.

The adjoints are those of ``g``, (rows, *x), and in its ``rows`` the second-order terms of what ``second`` names. One of
the two may be None. The result is added to ``into``, where that is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dag_hesse.kernels.arena import Arena, added

Pair = tuple[Tensor, Tensor]
Tensors = tuple[Tensor, ...]


def _joined(first: Tensor | None, second: Tensor | None, rows: slice, into: Tensor | None) -> Tensor:
    if first is not None and second is not None:
        first = first.clone()
        first[rows] += second
    found = second if first is None else first
    assert found is not None
    return added(found, into)


def softmax_tangent(arena: Arena, y: Tensor, x: Tensor, dims: list[int]) -> Pair:
    """y ∘ w and w = x − ⟨y,x⟩."""
    centered = x - (y * x).sum(dims, keepdim=True)
    return y * centered, centered


def softmax_adjoints(
    arena: Arena, y: Tensor, g: Tensor | None, second: Pair | None, rows: slice, dims: list[int], into: Tensor | None
) -> Tensor:
    """y ∘ (g − ⟨y,g⟩), and w ∘ μ − y ⟨w,μ⟩ of ``second`` = (μ, w)."""
    first = None if g is None else y * (g - (y * g).sum(dims, keepdim=True))
    term = None if second is None else second[1] * second[0]
    term = None if term is None else term - y * term.sum(dims, keepdim=True)
    return _joined(first, term, rows, into)


def log_softmax_tangent(arena: Arena, p: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    """x − ⟨p,x⟩."""
    return x - (p * x).sum(dims, keepdim=True)


def log_softmax_adjoints(
    arena: Arena, p: Tensor, g: Tensor | None, second: Pair | None, rows: slice, dims: list[int], into: Tensor | None
) -> Tensor:
    """g − p Σg, and −s p ∘ w of ``second`` = (s, w), where s is a number a row of x."""
    first = None if g is None else g - p * g.sum(dims, keepdim=True)
    return _joined(first, None if second is None else -second[0] * p * second[1], rows, into)


def _standardized(y: Tensor, r: Tensor, g: Tensor, dims: list[int], center: bool) -> Tensor:
    centered = g - g.mean(dims, keepdim=True) if center else g
    return r * (centered - y * (y * g).mean(dims, keepdim=True))


def standardize_tangent(
    arena: Arena,
    y: Tensor,
    r: Tensor,
    mu: Tensor | None,
    x: Tensor,
    dims: list[int],
    center: bool,
    inner: Sequence[int] | None,
) -> Tensors:
    """ẏ = r (P x − y⟨y,x⟩) by means, where P takes the mean off if there is a ``center``; with μ also −r⟨y,x⟩, −r⟨μ,x⟩.

    ``inner``: sizes of the trailing axes, where the standardization is a LayerNorm over them.
    """
    moved = _standardized(y, r, x, dims, center)
    return (moved, *(-r * (v * x).mean(dims, keepdim=True) for v in (y, mu) if v is not None and mu is not None))


def standardize_adjoints(
    arena: Arena,
    y: Tensor,
    r: Tensor,
    g: Tensor | None,
    second: Tensors | None,
    rows: slice,
    dims: list[int],
    center: bool,
    inner: Sequence[int] | None,
    into: Tensor | None,
) -> Tensor:
    """r (P g − y⟨y,g⟩), and a μ + c ẏ + b y of ``second`` = (μ, c, ẏ, a, b); a, b and c are numbers a row of x."""
    first, term = None if g is None else _standardized(y, r, g, dims, center), None
    if second is not None:
        mu, overlap, moved, of_mu, of_y = second
        term = of_mu * mu + overlap * moved + of_y * y
    return _joined(first, term, rows, into)
