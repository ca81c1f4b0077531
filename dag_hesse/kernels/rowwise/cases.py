"""Shapes, strides, rows and dtypes that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dag_hesse.kernels.rowwise import softmax as softmax_kernel
from dag_hesse.kernels.rowwise import standardize as standardize_kernel

_SHAPES = ((5,), (3, 7), (2, 3, 130), (4, 1), (129, 131))


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments)."""
    for shape in _SHAPES:
        for rows in (1, 3):
            x, g = torch.randn(shape, dtype=dtype), torch.randn(rows, *shape, dtype=dtype)
            yield softmax_kernel, (torch.softmax(x, -1), g, [-1])
            yield softmax_kernel, (torch.softmax(x, 0), g, [-x.ndim])
            turned = torch.softmax(x.mT.contiguous().mT if x.ndim > 1 else x, -1)
            yield softmax_kernel, (turned, g.movedim(0, -1).contiguous().movedim(-1, 0), [-1])
            for center in (True, False):
                off = x - x.mean(-1, keepdim=True) if center else x
                r = (off * off).mean(-1, keepdim=True).add(1e-3).rsqrt()
                yield standardize_kernel, (off * r, r, g, [-1], center, list(shape[-1:]) if center else None)
