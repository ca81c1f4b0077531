"""Shapes, strides, rows and dtypes that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dag_hesse.kernels.rowwise import (
    Adjoint,
    Means,
    log_softmax_adjoints,
    log_softmax_tangent,
    softmax_adjoints,
    softmax_tangent,
    standardize_adjoints,
    standardize_tangent,
)

_SHAPES = (((5,), 1), ((3, 7), 1), ((3, 7), 3), ((2, 3, 65), 2), ((4, 1), 2), ((9, 131), 3))  # with rows
_LONG = (((1, 63), 1), ((3, 1000), 2), ((1, 8200), 2))  # the last is more than a chip holds


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments)."""
    for shape, rows in _SHAPES:
        x = torch.randn(shape, dtype=dtype)
        for value, dim, g in _layouts(x, _normal(rows, x)):
            yield from _softmax(torch.softmax(value, dim), g, [dim])
    for shape, rows in _LONG:
        x = torch.randn(shape, dtype=dtype)
        yield from _softmax(torch.softmax(x, -1), _normal(rows, x), [-1])
    for shape, rows in (*_SHAPES, *_LONG):
        for center in (True, False):
            yield from _standardize(torch.randn(shape, dtype=dtype), rows, [-1], center)
    for center in (True, False):
        yield from _standardize(torch.randn(2, 3, 4, dtype=dtype), 2, [-2, -1], center)


def _layouts(x: Tensor, g: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
    """x, an axis, and what lies as x does or otherwise."""
    yield x, -1, g
    if x.ndim > 1:
        turned = x.mT.contiguous().mT
        yield x, -x.ndim, g
        yield turned, -1, g.movedim(0, -1).contiguous().movedim(-1, 0)
        yield turned, -2, g.mT.contiguous().mT


def _normal(rows: int, like: Tensor) -> Tensor:
    return torch.randn(rows, *like.shape, dtype=like.dtype)


def _softmax(y: Tensor, g: Tensor, dims: list[int]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    yield softmax_tangent, (y, g, dims)
    yield log_softmax_tangent, (y, g, dims)
    total = y.sum(dims, keepdim=True) * 0.3
    for kernel, shared in ((softmax_adjoints, torch.randn_like(y)), (log_softmax_adjoints, total)):
        yield from _adjoints(kernel, (y,), g, lambda w, shared=shared: (shared, w), dims)


def _standardize(x: Tensor, rows: int, dims: list[int], center: bool) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    off = x - x.mean(dims, keepdim=True) if center else x
    r = (off * off).mean(dims, keepdim=True).add(1e-3).rsqrt()
    how, y, g, mu = (
        Means(dims, center, list(x.shape[dims[0] :]) if center else None),
        off * r,
        _normal(rows, x),
        _normal(1, x)[0],
    )
    yield standardize_tangent, (y, r, None, g, how)
    yield standardize_tangent, (y, r, mu, g, how)

    def second(w: Tensor) -> tuple[Tensor, ...]:
        return (mu, _normal(1, r)[0], w, *(_normal(len(w), r) for _ in range(2)))

    yield from _adjoints(standardize_adjoints, (y, r), g, second, how)


def _adjoints(kernel: Any, own: tuple[Any, ...], g: Tensor, second: Any, how: Any) -> Iterator[tuple[Any, Any]]:
    """Of an adjoint alone, of a residual alone, of both, and into a buffer."""
    yield kernel, (*own, Adjoint(g), how)
    yield kernel, (*own, Adjoint(None, second(g), into=torch.randn_like(g)), how)
    yield kernel, (*own, Adjoint(g, second(torch.randn_like(g))), how)
    rows = len(g)
    wide = torch.cat([g, torch.randn_like(g)])
    yield kernel, (*own, Adjoint(wide, second(g), slice(rows, None), torch.randn_like(wide)), how)
