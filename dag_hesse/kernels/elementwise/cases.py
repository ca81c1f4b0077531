"""Shapes with broadcasting, kinds of coefficients, rows and slots that the implementations are tested at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dag_hesse.kernels.elementwise import Adjoint, Coefficient, Coefficients, Gate, adjoints, tangent

_SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (  # of the output, then of the inputs
    ((5,), (5,)),
    ((3, 4), (3, 4), (4,)),
    ((2, 3, 129), (2, 3, 129), (3, 1), ()),
    ((2, 1, 3), (1,), (2, 1, 3)),
)
# What a dense coefficient is replaced by.
_KINDS: tuple[Callable[[torch.Tensor], Coefficient], ...] = (
    lambda c: c,
    lambda c: 1.0,
    lambda c: -0.5,
    Gate,
    lambda c: c.flatten()[:1],
)


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments)."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype)

    for out, *inputs in _SHAPES:
        for kind in _KINDS:
            first = [kind(normal(*out)) for _ in inputs]
            pairs = {(i, j) for i in range(len(inputs)) for j in range(len(inputs)) if (i + j) % 2 or i == j}
            seconds = {pair: normal(*out) for pair in pairs}
            for count, rows in ((1, slice(None)), (4, slice(None)), (4, slice(2, None))):
                near = {slot: normal(len(range(count)[rows]), *shape) for slot, shape in enumerate(inputs)}
                of, wanted = Coefficients(first, seconds, out), dict(enumerate(inputs))
                yield tangent, (of, near)
                for met in (near, {0: near[0]}, {}):
                    yield adjoints, (of, Adjoint(normal(count, *out), met, rows, wanted))
                yield adjoints, (of, Adjoint(None, near, slice(None), wanted))
