"""By one Triton kernel a program, generated from its instructions: every operand is read once, every result written.

On the CPU it runs in Triton's interpreter, for tests (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from dag_hesse.kernels.arena import Arena, is_dense
from dag_hesse.kernels.generated import DTYPES, HEAD, available, computed, elsewhere, launch, load, number
from dag_hesse.kernels.machine import machine
from dag_hesse.kernels.program.build import Program

# Odd powers of tanh's series: below 1/4, where 1 − exp(−2x) cancels, they leave less than one rounding of float64.
_SERIES = (
    -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075, -929569 / 638512875, 6404582 / 10854718875,
    -443861162 / 1856156927625,
)  # fmt: skip

# Instruction -> expression of its number k and its arguments.
_CODE: Mapping[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "fma": "{0} * {1} + {2}",
    "fnma": "{2} - {0} * {1}",
    "add_i": "{0} + {k}",
    "mul_i": "{0} * {k}",
    "rsub_i": "{k} - {0}",
    "rdiv_i": "{k} / {0}",
    "gt_i": "({0} > {k}).to(T)",
    "ge_i": "({0} >= {k}).to(T)",
    "lt_i": "({0} < {k}).to(T)",
    "le_i": "({0} <= {k}).to(T)",
    "where": "tl.where({0} != 0, {1}, {2})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt({0})",
    "tanh": "_tanh({0})",
    "sigmoid": "1 / (1 + tl.exp(-{0}))",
    "erf": "tl.math.erf({0})",
    "abs": "tl.abs({0})",
    "fill": "tl.full([BLOCK], {k}, T)",
}
_TANH = f"""
@triton.jit
def _tanh(x):
    square = x * x
    series = {" + square * (".join(repr(c) for c in _SERIES)}{")" * (len(_SERIES) - 1)}
    t = tl.exp(-2 * tl.abs(x))
    far = (1 - t) / (1 + t)
    return tl.where(square < 0.0625, x + x * square * series, tl.where(x < 0, -far, far))
"""


def refuse(program: Program | None, operands: Sequence[Tensor], like: Tensor) -> str | None:
    """Why a program cannot be run on these tensors, or is not worth it; None if it can."""
    if reason := elsewhere(like):
        return reason
    if like.dtype not in DTYPES or any(x.dtype != like.dtype or x.device != like.device for x in operands):
        return "operands differ in dtype or device, or are no floating-point tensors"
    if not is_dense(like):
        return "the results' layout has gaps"
    if program is not None and program.row_axes:
        return "functions of rows have kernels of their own here"
    least = machine(like.device).program
    return available() if like.numel() >= least else f"there are fewer than {least} elements"


def run(arena: Arena, program: Program, operands: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Results of a program on ``operands``, which broadcast to ``like``; shaped and laid out as that."""
    results = [arena.blank(like) for _ in range(program.results)]
    order = sorted(range(like.ndim), key=lambda axis: -like.stride()[axis])  # as elements lie in memory
    spread = [x.expand(like.shape) for x in operands]
    dense = tuple(x.stride() == like.stride() for x in spread)
    sizes = [like.shape[axis] for axis in order]
    strides = [x.stride(axis) for x, flat in zip(spread, dense, strict=True) if not flat for axis in order]
    kernel = compiled(program, dense, like.ndim, computed(like.dtype))
    launch(kernel, like.numel(), like.device, *spread, *results, like.numel(), *sizes, *strides)
    return results


@cache
def compiled(program: Program, dense: tuple[bool, ...], ndim: int, dtype: str) -> Any:
    """The kernel of a program: ``kernel[grid](*operands, *results, count, *sizes, *strides, BLOCK=…)``."""
    return load(source(program, dense, ndim, dtype), "kernel")


def source(program: Program, dense: Sequence[bool], ndim: int, dtype: str) -> str:
    """Triton code of a program.

    Args:
        program: what is computed.
        dense: per operand, whether its elements lie as those of the results.
        ndim: axes that the other operands are broadcast along.
        dtype: what is computed in.

    Examples:
        >>> from dag_hesse.kernels.program import Builder
        >>> b = Builder(operands=1)
        >>> program = b.program([b.multiply(b.operand(0), 2.0)])
        >>> print(source(program, [True], 1, "tl.float32").splitlines()[-2])
            v1 = v0 * 2.0
    """
    operands, results = program.operands, program.results
    axes, spread = range(ndim), [k for k, flat in enumerate(dense) if not flat]
    names = [f"p{k}" for k in range(operands + results)] + ["count"] + [f"n{a}" for a in axes]
    names += [f"s{k}_{a}" for k in spread for a in axes] + ["BLOCK: tl.constexpr"]
    lines = [
        f"def kernel({', '.join(names)}):",
        f"T: tl.constexpr = {dtype}",
        "at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)",
        "mask = at < count",
    ]
    if spread:
        lines.append("rest = at")
        lines += [f"i{a} = rest % n{a}; rest = rest // n{a}" for a in reversed(axes)]
    for k in range(operands):
        place = "at" if dense[k] else " + ".join(["0", *(f"i{a} * s{k}_{a}" for a in axes)])
        lines.append(f"v{k} = tl.load(p{k} + ({place}), mask=mask, other=1.0).to(T)")
    for name, (to, *arguments), constant in program.rows:
        lines.append(f"v{to} = " + _CODE[name].format(*(f"v{a}" for a in arguments), k=number(constant)))
    lines += [f"tl.store(p{k} + at, v{k}, mask=mask)" for k in range(operands, operands + results)]
    body = "\n    ".join(lines)
    return f"{HEAD}{_TANH}\n\n@triton.jit\n{body}\n"


__all__ = ["compiled", "refuse", "run", "source"]
