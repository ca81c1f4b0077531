"""Shapes, strides and rows that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dag_hesse.kernels.contraction import outer, product


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments); what is added to is given as a function that makes it."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype)

    shared = normal(1, 6, 34).expand(4, 6, 34)[None]  # one matrix for all of an axis
    for b in (normal(1, 4, 34, 70), normal(3, 4, 34, 70), normal(1, 4, 70, 34).mT):
        for into in (None, normal(len(b), 4, 6, 70)):
            yield product, (shared, b, into)
            yield product, (b.mT, shared.mT, None if into is None else into.mT)
    for n, k, m in ((3, 5, 7), (1, 1, 1), (67, 33, 70)):
        for lead in ((), (2,)) if n < 64 else ((),):
            for p, q in ((1, 1), (3, 1), (1, 3), (3, 3)):
                a, b = normal(p, *lead, n, k), normal(q, *lead, k, m)
                rows, layouts = max(p, q), [(a, b), (a, b.mT.contiguous().mT), (a.mT.contiguous().mT, b)]
                for left, right in layouts if p == q else layouts[:1]:
                    for into in (None, normal(rows, *lead, n, m), normal(rows, *lead, m, n).mT):
                        yield product, (left, right, into)
                g = normal(q, *lead, n, m)
                for turned in (False, True) if p == q else (True,):
                    start = normal(rows, *lead, m, k).mT if turned else normal(rows, *lead, k, m)
                    for terms in ([(g, a)], [(g, a), (normal(p, *lead, n, m), normal(q, *lead, n, k))]):
                        for into in (None, start):
                            yield outer, (terms, turned, into)
