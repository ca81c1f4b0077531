"""Shapes, masks, strides, rows and slots that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dag_hesse.kernels.attention import Bound, Operands, Residual, adjoints, tangent, value
from dag_hesse.kernels.attention.reference import value as out_of


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments); ``into`` is given for some slots."""
    for a in _operands(dtype):
        yield value, (a,)
        out = out_of(None, a)  # type: ignore[arg-type]
        for p in (1, 3):
            normal = [torch.randn(p, *x.shape, dtype=dtype) for x in (a.q, a.k, a.v)]
            lam, abar, wide = (torch.randn(n, *out.shape, dtype=dtype) for n in (1, p, 2 * p))
            bound = Bound(lam[0], (lam[0] * out).sum(-1, keepdim=True))
            for slots in ((0, 1, 2), (0,), (1,), (2,), (0, 2)):
                tangents = {slot: normal[slot] for slot in slots}
                yield tangent, (a, tangents)
                sums = [torch.randn(p, *out.shape[:2], 1, dtype=dtype) for _ in range(2)]
                residual = Residual(tangents, *sums)
                if not {0, 1} & set(slots):
                    residual = Residual(tangents, torch.zeros_like(sums[0]), sums[1])
                yield adjoints, (a, out, bound, abar, residual, slice(None), slots, {})
                yield adjoints, (a, out, bound, wide, residual, slice(p, None), (0, 1, 2), {})
                yield adjoints, (a, out, bound, None, residual, slice(None), slots, {})
                yield adjoints, (a, out, None, abar, None, slice(None), slots, {slots[0]: normal[slots[0]]})


def _operands(dtype: torch.dtype) -> Iterator[Operands]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    def of(samples: int, heads: int, s: int, t: int, **options: Any) -> Operands:
        n = samples * heads
        k = normal(n, t, 3).mT if s % 2 else normal(n, 3, t)
        return Operands(normal(n, s, 3), k, normal(n, t, 2), (samples, heads), **options)

    causal = torch.full((5, 5), -torch.inf, dtype=dtype).triu(1)[None, None]
    yield of(2, 3, 5, 7, scale=0.3)
    yield of(2, 2, 5, 5, bias=causal, spans=tuple((0, k) for k in range(5)))
    yield of(1, 1, 1, 1)
    padded = torch.zeros(2, 1, 1, 6, dtype=dtype)
    padded[1, ..., :3] = -torch.inf
    yield of(2, 3, 4, 6, bias=padded, scale=0.5, factor=1.25, drop=torch.rand(2, 3, 4, 6, dtype=dtype).round())
    none = torch.zeros(1, 2, 3, 4, dtype=dtype)
    none[:, 1, 1] = -torch.inf
    yield of(3, 2, 3, 4, bias=none, blank=True)
    hidden = torch.rand(1, 2, 3, 4) < 0.4
    yield of(2, 2, 3, 4, bias=hidden.to(dtype) * 2, hidden=hidden, scale=0.5)
