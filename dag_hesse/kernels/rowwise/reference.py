"""The definitions. Probes lie in front: (rows, *x). Sums and means go over ``dims``, counted from the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dag_hesse.kernels.arena import Arena, added

Pair = tuple[Tensor, Tensor]
Tensors = tuple[Tensor, ...]


class Adjoint(NamedTuple):
    """The transpose of ``g``, (rows, *x), and in its ``rows`` the second-order terms of what ``second`` names.

    One of the two may be None. The result is added to ``into``, where that is given.
    """

    g: Tensor | None
    second: Tensors | None = None
    rows: slice = slice(None)
    into: Tensor | None = None

    def joined(self, first: Tensor | None, second: Tensor | None) -> Tensor:
        """Both terms, where they belong."""
        if first is not None and second is not None and self.rows != slice(None):
            first = first.clone()
            first[self.rows] += second
        elif first is not None and second is not None:
            first = first + second
        found = second if first is None else first
        assert found is not None
        return added(found, self.into)


class Means(NamedTuple):
    """Axes of a standardization; whether the mean is taken off; sizes of trailing axes, where it is a LayerNorm."""

    dims: list[int]
    center: bool
    inner: Sequence[int] | None


def softmax_tangent(arena: Arena, y: Tensor, x: Tensor, dims: list[int]) -> Pair:
    """y ∘ w and w = x − ⟨y,x⟩."""
    centered = x - (y * x).sum(dims, keepdim=True)
    return y * centered, centered


def softmax_adjoints(arena: Arena, y: Tensor, a: Adjoint, dims: list[int]) -> Tensor:
    """y ∘ (g − ⟨y,g⟩), and w ∘ μ − y ⟨w,μ⟩ of ``second`` = (μ, w)."""
    first = None if a.g is None else y * (a.g - (y * a.g).sum(dims, keepdim=True))
    term = None if a.second is None else a.second[1] * a.second[0]
    term = None if term is None else term - y * term.sum(dims, keepdim=True)
    return a.joined(first, term)


def log_softmax_tangent(arena: Arena, p: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    """x − ⟨p,x⟩."""
    return x - (p * x).sum(dims, keepdim=True)


def log_softmax_adjoints(arena: Arena, p: Tensor, a: Adjoint, dims: list[int]) -> Tensor:
    """g − p Σg, and −s p ∘ w of ``second`` = (s, w), where s is a number a row of x."""
    first = None if a.g is None else a.g - p * a.g.sum(dims, keepdim=True)
    return a.joined(first, None if a.second is None else -a.second[0] * p * a.second[1])


def _standardized(y: Tensor, r: Tensor, g: Tensor, how: Means) -> Tensor:
    centered = g - g.mean(how.dims, keepdim=True) if how.center else g
    return r * (centered - y * (y * g).mean(how.dims, keepdim=True))


def standardize_tangent(arena: Arena, y: Tensor, r: Tensor, mu: Tensor | None, x: Tensor, how: Means) -> Tensors:
    """ẏ = r (P x − y⟨y,x⟩) by means; P takes the mean off where there is a ``center``. With μ also −r⟨y,x⟩, −r⟨μ,x⟩."""
    moved = _standardized(y, r, x, how)
    if mu is None:
        return (moved,)
    return (moved, *(-r * (v * x).mean(how.dims, keepdim=True) for v in (y, mu)))


def standardize_adjoints(arena: Arena, y: Tensor, r: Tensor, a: Adjoint, how: Means) -> Tensor:
    """r (P g − y⟨y,g⟩), and a μ + c ẏ + b y of ``second`` = (μ, c, ẏ, a, b); a, b and c are numbers a row of x."""
    first, term = None if a.g is None else _standardized(y, r, a.g, how), None
    if a.second is not None:
        mu, overlap, moved, of_mu, of_y = a.second
        term = of_mu * mu + overlap * moved + of_y * y
    return a.joined(first, term)
