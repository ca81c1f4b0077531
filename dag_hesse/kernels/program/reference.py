"""Plain torch definition: what each instruction of a program does to whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.program.build import Program


def _last(axes: float) -> list[int]:
    return list(range(-int(axes), 0))


INSTRUCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "add": lambda k, a, b: a + b,
    "sub": lambda k, a, b: a - b,
    "mul": lambda k, a, b: a * b,
    "div": lambda k, a, b: a / b,
    "fma": lambda k, a, b, c: a * b + c,
    "fnma": lambda k, a, b, c: c - a * b,
    "add_i": lambda k, a: a + k,
    "mul_i": lambda k, a: a * k,
    "rsub_i": lambda k, a: k - a,
    "rdiv_i": lambda k, a: k / a,
    "gt_i": lambda k, a: (a > k).to(a.dtype),
    "ge_i": lambda k, a: (a >= k).to(a.dtype),
    "lt_i": lambda k, a: (a < k).to(a.dtype),
    "le_i": lambda k, a: (a <= k).to(a.dtype),
    "where": lambda k, a, b, c: torch.where(a != 0, b, c),
    "exp": lambda k, a: torch.exp(a),
    "log": lambda k, a: torch.log(a),
    "sqrt": lambda k, a: torch.sqrt(a),
    "tanh": lambda k, a: torch.tanh(a),
    "sigmoid": lambda k, a: torch.sigmoid(a),
    "erf": lambda k, a: torch.erf(a),
    "abs": lambda k, a: torch.abs(a),
    "row_sum": lambda k, a: a.sum(_last(k), keepdim=True).expand(a.shape),
    "row_mean": lambda k, a: a.mean(_last(k), keepdim=True).expand(a.shape),
}


def run(arena: Arena, program: Program, operands: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Results of a program, shaped and laid out as ``like``; those that are one number a row, in the order of axes."""
    at = dict(enumerate(x.expand(like.shape) for x in operands))
    for name, (to, *arguments), number in program.rows:
        if name == "fill":
            at[to] = torch.full_like(like, number)
        else:
            at[to] = INSTRUCTIONS[name](number, *(at[a] for a in arguments))
    return [_kept(program, k, at[program.operands + k], like) for k in range(program.results)]


def _kept(program: Program, k: int, x: Tensor, like: Tensor) -> Tensor:
    if not program.per_row[k]:
        return torch.empty_like(like).copy_(x)
    for axis in _last(program.row_axes):
        x = x.narrow(axis, 0, 1)
    return x.contiguous()
