"""Programs, shapes, strides and dtypes that the implementations are tested at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from dag_hesse.kernels.program import Builder, run
from dag_hesse.kernels.program.build import ROWS
from dag_hesse.kernels.program.reference import INSTRUCTIONS

_ARITY = {"add": 2, "sub": 2, "mul": 2, "div": 2, "fma": 3, "fnma": 3, "where": 3}


def cases(dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(kernel, arguments): every instruction by itself, on operands that broadcast and lie in other orders."""
    for name in INSTRUCTIONS.keys() - set(ROWS):
        arity = _ARITY.get(name, 1)
        for shape in ((1,), (4, 7), (3, 5, 131)):
            builder, like = Builder(arity), torch.rand(shape, dtype=dtype) + 0.5
            program = builder.program([builder.emit(name, *map(builder.operand, range(arity)), number=0.7)])
            row = torch.rand(shape[-1:], dtype=dtype) + 0.5
            turned = (torch.rand(shape[::-1], dtype=dtype) + 0.5).permute(*range(len(shape))[::-1])
            yield run, (program, [like, row, turned][:arity], like)
    for name in ROWS:
        for shape, axes in (((1,), 1), ((4, 7), 1), ((3, 5, 131), 2), ((5, 600), 1)):
            x, y = (torch.randn(shape, dtype=dtype) for _ in range(2))
            builder = Builder(2)
            total = builder.emit(name, builder.operand(0), number=axes)
            centered = builder.emit("fma", total, builder.operand(1), builder.operand(0))
            last = builder.emit(name, centered, number=axes)
            for narrow in ((), [last]):
                yield run, (builder.program([centered, last], narrow), [x, y[..., :1]], x)
    builder = Builder(1)
    x = torch.rand(5, dtype=dtype)
    yield run, (builder.program([builder.emit("lt_i", builder.operand(0), number=math.inf)]), [x], x)
