"""Shapes, masks, strides, rows and slots that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dag_hesse.kernels.attention import Adjoint, Bound, Operands, Residual, adjoints, tangent, value
from dag_hesse.kernels.attention.reference import value as out_of
from dag_hesse.kernels.generated import interpreted


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments); ``into`` is given for some slots. In Triton's interpreter, which is slow, fewer."""
    if interpreted():
        yield from _tiled(dtype)
        return
    for a in _operands(dtype):
        yield value, (a,)
        out = out_of(None, a)  # type: ignore[arg-type]
        for p in (1, 3):
            normal = [torch.randn(p, *x.shape, dtype=dtype) for x in (a.q, a.k, a.v)]
            for slots in ((0, 1, 2), (0,), (1,), (2,), (0, 2)):
                bound, residual, abar, wide = _met(a, out, {slot: normal[slot] for slot in slots})
                yield tangent, (a, out, residual.tangents)
                yield adjoints, (a, out, bound, Adjoint(abar, residual, slice(None), slots, {}))
                yield adjoints, (a, out, bound, Adjoint(wide, residual, slice(p, None), (0, 1, 2), {}))
                yield adjoints, (a, out, bound, Adjoint(None, residual, slice(None), slots, {}))
                yield adjoints, (a, out, None, Adjoint(abar, None, slice(None), slots, {slots[0]: normal[slots[0]]}))


def _met(a: Operands, out: Tensor, tangents: dict[int, Tensor]) -> tuple[Bound, Residual, Tensor, Tensor]:
    """λ, a residual of tangents, and adjoints of one channel and of both."""
    p = len(next(iter(tangents.values())))
    lam, abar, wide = (torch.randn(n, *out.shape, dtype=out.dtype) for n in (1, p, 2 * p))
    mu, delta = (torch.randn(p, *out.shape[:2], 1, dtype=out.dtype) for _ in range(2))
    mu = mu if {0, 1} & set(tangents) else torch.zeros_like(mu)
    return Bound(lam[0], (lam[0] * out).sum(-1, keepdim=True)), Residual(tangents, mu, delta), abar, wide


def _tiled(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Sizes beside those of tiles, every kind of mask, every set of tangents."""
    whole = dtype is torch.float64
    every = [_of(dtype, 1, 1, *size) for size in ((1, 1), (63, 65))[: 1 + whole]] + list(_masked(dtype))
    for n, a in enumerate(every):
        out = out_of(None, a)  # type: ignore[arg-type]
        sets = ((0, 1, 2), (0,), (1,), (2,)) if n == 0 else ((0, 1, 2),)
        for slots in sets:
            given = {slot: torch.randn(1, *(a.q, a.k, a.v)[slot].shape, dtype=dtype) for slot in slots}
            bound, residual, abar, wide = _met(a, out, given)
            yield tangent, (a, out, given)
            into = {0: torch.randn(2, *a.q.shape).to(dtype)}
            yield adjoints, (a, out, bound, Adjoint(wide, residual, slice(1, None), (0, 1, 2), into))
            if whole:
                yield adjoints, (a, out, bound, Adjoint(None, residual, slice(None), slots, {}))
                yield adjoints, (a, out, None, Adjoint(abar, None, slice(None), slots, given))


def _of(dtype: torch.dtype, samples: int, heads: int, s: int, t: int, d: int = 3, **options: Any) -> Operands:
    """Operands of normal numbers; k lies as products want it, or turned, and q by matrices, or by its rows."""
    n = samples * heads
    k = torch.randn(n, t, d, dtype=dtype).mT if s % 2 else torch.randn(n, d, t, dtype=dtype)
    q = torch.randn(n, s, d, dtype=dtype) if s % 2 else torch.randn(s, n, d, dtype=dtype).transpose(0, 1)
    v = torch.randn(n, t, 2, dtype=dtype)
    return Operands(q, k, v, (samples, heads), **options)


def _masked(dtype: torch.dtype) -> Iterator[Operands]:
    """Few matrices, with what may be added, hidden and dropped; one is wide."""
    size = 40
    causal = torch.full((size, size), -torch.inf, dtype=dtype).triu(1)[None, None]
    yield _of(dtype, 1, 1, size, size, bias=causal, spans=tuple((0, k) for k in range(size)), scale=0.4)
    padded = torch.zeros(2, 1, 1, 6, dtype=dtype)
    padded[1, ..., :3] = -torch.inf
    yield _of(dtype, 2, 1, 4, 6, bias=padded, scale=0.5, factor=1.25, drop=torch.rand(2, 1, 4, 6).round().to(dtype))
    none = torch.zeros(1, 2, 3, 4, dtype=dtype)
    none[:, 1, 1] = -torch.inf
    yield _of(dtype, 1, 2, 3, 4, d=70, bias=none, blank=True)
    hidden = torch.rand(1, 2, 3, 4) < 0.4
    yield _of(dtype, 1, 2, 3, 4, bias=hidden.to(dtype) * 2, hidden=hidden, scale=0.5)


def _operands(dtype: torch.dtype) -> Iterator[Operands]:
    causal = torch.full((5, 5), -torch.inf, dtype=dtype).triu(1)[None, None]
    yield _of(dtype, 2, 3, 5, 7, scale=0.3)
    yield _of(dtype, 2, 2, 5, 5, bias=causal, spans=tuple((0, k) for k in range(5)))
    yield _of(dtype, 1, 1, 1, 1)
    padded = torch.zeros(2, 1, 1, 6, dtype=dtype)
    padded[1, ..., :3] = -torch.inf
    yield _of(dtype, 2, 3, 4, 6, bias=padded, scale=0.5, factor=1.25, drop=torch.rand(2, 3, 4, 6, dtype=dtype).round())
    none = torch.zeros(1, 2, 3, 4, dtype=dtype)
    none[:, 1, 1] = -torch.inf
    yield _of(dtype, 3, 2, 3, 4, bias=none, blank=True)
    hidden = torch.rand(1, 2, 3, 4) < 0.4
    yield _of(dtype, 2, 2, 3, 4, bias=hidden.to(dtype) * 2, hidden=hidden, scale=0.5)
