"""Shapes, strides, rows and dtypes that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dag_hesse.kernels.batch_affine import adjoint, sums, tangent


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments)."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype)

    for shape in ((3, 4, 5, 7), (1, 3, 5, 7), (2, 3), (4, 3, 6), (1, 2, 3, 4, 5), (5, 3, 33, 40)):
        channels = shape[1]
        mean, var, gain = normal(channels), torch.rand(channels, dtype=dtype) + 0.5, normal(channels)
        for lay in (lambda t: t, lambda t: t.movedim(2, -1).contiguous().movedim(-1, 2)):
            for rows, others in ((1, 1), (3, 1), (1, 3), (2, 2)):
                for other in (lambda t: t, lay):
                    g, x = lay(normal(rows, *shape)), other(normal(others, *shape))
                    yield sums, (g, x, mean, (var + 1e-3).rsqrt(), var, 1e-3)
            for rows in (1, 3):
                xdot, x, scale, shift = lay(normal(rows, *shape)), lay(normal(1, *shape)), *normal(2, rows, channels)
                yield tangent, (gain, xdot, x[0], scale, shift)
                yield tangent, (gain, xdot, normal(*shape), scale, None)
                yield tangent, (gain, xdot, x[0], None, shift)
                yield tangent, (gain, xdot, x[0], None, None)
                yield tangent, (gain, None, x[0], scale, shift)
                yield tangent, (gain, None, x[0], None, shift)
                yield adjoint, (gain, xdot, None, None, slice(None))
                yield adjoint, (gain, xdot, x, scale, slice(None))
                yield adjoint, (gain, None, x, scale, slice(None))
                yield adjoint, (gain, lay(normal(2 * rows, *shape)), x, scale, slice(rows, None))
