"""Shapes, strides, rows and dtypes that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dag_hesse.kernels.batch_affine import sums


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments)."""
    for shape in ((3, 4, 5, 7), (1, 3, 5, 7), (2, 3), (4, 3, 6), (1, 2, 3, 4, 5)):
        mean, var = torch.randn(shape[1], dtype=dtype), torch.rand(shape[1], dtype=dtype) + 0.5
        for rows, others in ((1, 1), (3, 1), (1, 3), (2, 2)):
            g, x = torch.randn(rows, *shape, dtype=dtype), torch.randn(others, *shape, dtype=dtype)
            for lay in (lambda t: t, lambda t: t.movedim(2, -1).contiguous().movedim(-1, 2)):
                for other in (lambda t: t, lay):
                    yield sums, (lay(g), other(x), mean, (var + 1e-3).rsqrt(), var, 1e-3)
