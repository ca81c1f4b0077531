"""Shapes and strides that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dag_hesse.kernels.layout import laid_out


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments)."""
    for shape, last in (((2, 3, 5, 7), torch.channels_last), ((1, 3, 40, 31), torch.channels_last),
                        ((2, 70, 10, 18), torch.channels_last), ((2, 180, 7, 10), torch.channels_last),
                        ((2, 5, 3, 4, 2), torch.channels_last_3d)):  # fmt: skip
        x = torch.randn(shape, dtype=dtype)
        for layout in (last, torch.contiguous_format):
            for given in (x, x.contiguous(memory_format=last), x.transpose(-1, -2), x[..., ::2]):
                yield laid_out, (given, layout)
    yield laid_out, (torch.randn(3, 4, dtype=dtype).T, torch.contiguous_format)
