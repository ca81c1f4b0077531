"""Sizes, strides and types that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dag_hesse.kernels.probe import signs, squares


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments)."""
    like = torch.empty(0, dtype=dtype)
    for key, first, shape in (
        (0, 0, (1, 1, 1)),
        (7, 3, (3, 1, 63)),
        (-5, 0, (2, 3, 65)),
        (1 << 62, 1 << 40, (2, 1, 4096)),
    ):
        yield signs, (key, first, shape, like)
    for shape in ((1, 1, 1), (3, 1, 63), (2, 3, 65), (2, 1, 1000), (1, 1, 20_000)):
        x, y = torch.randn(2, *shape, dtype=dtype)
        yield squares, ((x,),)
        yield squares, ((x, y),)
    x = torch.randn(3, 4, 10, dtype=dtype)
    yield squares, ((x.transpose(0, 1)[..., 2:7], x.transpose(0, 1)[..., 5:]),)
    yield squares, ((x.mT, x.mT),)
