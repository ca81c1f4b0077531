"""Geometries, strides and rows that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dag_hesse.kernels.convolution import forward, geometry, input_transpose, weight_transpose

# input, weight, (stride, padding, dilation, transposed, output padding, groups)
_CALLS: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], ...] = (
    ((2, 3, 5, 6), (4, 3, 3, 3), ([1], [1], [1], False, [0], 1)),
    ((1, 4, 7, 5), (8, 4, 1, 1), ([2], [0], [1], False, [0], 1)),
    ((8, 4, 8, 8), (8, 4, 1, 1), ([2], [0], [1], False, [0], 1)),  # oneDNN's own weight adjoint is wrong, channels last
    ((2, 6, 5, 4), (4, 6, 1, 1), ([1], [0], [1], False, [0], 1)),
    ((40, 30, 1, 1), (36, 30, 1, 1), ([1], [0], [1], False, [0], 1)),  # weight adjoints larger than an image
    ((2, 4, 2, 2), (64, 4, 3, 3), ([1], [1], [1], False, [0], 1)),  # a large weight: by patches
    ((2, 4, 1, 1), (16, 4, 3, 3), ([1], [1], [1], False, [0], 1)),  # one kernel tap meets the input
    ((2, 3, 1, 4), (2, 3, 1, 1), ([3], [1], [1], False, [0], 1)),  # the output reads padding alone
    ((2, 4, 6, 6), (6, 2, 3, 3), ([1], [0], [2], False, [0], 2)),
    ((2, 6, 6, 6), (6, 1, 3, 3), ([1], [1], [1], False, [0], 6)),
    ((2, 4, 3, 3), (4, 3, 2, 2), ([2], [0], [1], True, [1], 1)),
    ((8, 9, 4, 4), (9, 4, 1, 1), ([2], [0], [1], True, [1], 1)),
    ((3, 2, 9), (5, 2, 4), ([2], [1], [1], False, [0], 1)),
    ((1, 2, 4, 5, 3), (3, 2, 2, 3, 1), ([1], [1], [1], False, [0], 1)),
)


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments)."""
    for (x_shape, w_shape, arguments), lies_last in product(_CALLS, (True, False)):
        x, w = torch.randn(x_shape, dtype=dtype), torch.randn(w_shape, dtype=dtype)
        y = torch.ops.aten.convolution(x, w, None, *arguments)
        geo = geometry(x_shape, w_shape, y.shape, (None, None, None, *arguments), lies_last)

        def normal(rows: int, like: Tensor) -> Tensor:
            return torch.randn(rows, *like.shape, dtype=like.dtype)

        for p, q in ((1, 1), (3, 1), (1, 3), (3, 3)):
            a, b, g, rows = normal(p, x), normal(q, w), normal(p, y), max(p, q)
            last = a.movedim(2, -1).contiguous().movedim(-1, 2)
            for left in (a, last):
                yield forward, (geo, left, b, None)
            yield forward, (geo, a, b, normal(rows, y))
            for into in (None, normal(rows, x)):
                yield input_transpose, (geo, g, b, into)
            for terms in ([(g, normal(q, x))], [(g, normal(q, x)), (normal(q, y), a)]):
                for into in (None, normal(rows, w)):
                    yield weight_transpose, (geo, terms, into)
