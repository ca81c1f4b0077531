"""By the C++ extension: one pass over memory, in all threads."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, is_dense
from dag_hesse.kernels.machine import machine
from dag_hesse.kernels.program.build import Program, narrowed


def refuse(program: Program | None, operands: Sequence[Tensor], like: Tensor) -> str | None:
    """Why a program cannot be run on these tensors, or is not worth it; None if it can."""
    if like.device.type not in ("cpu", "meta") or like.dtype not in (torch.float32, torch.float64):
        return f"programs run on CPU tensors of float32 or float64, not {like.device.type} and {like.dtype}"
    if any(x.dtype != like.dtype or x.device != like.device for x in operands):
        return "operands differ in dtype or device"
    if not is_dense(like):
        return "the results' layout has gaps"
    if program is not None and program.row_axes and (reason := refuse_rows(like, program.row_axes)):
        return reason
    least = machine(like.device).program
    return None if like.numel() >= least else f"there are fewer than {least} elements"


def refuse_rows(like: Tensor, axes: int) -> str | None:
    """Why rows of the last axes cannot be taken whole, or are not worth it."""
    if not like.is_contiguous():
        return "the elements of a row do not lie beside each other"
    least, most = machine(like.device).rows, machine(like.device).row
    if prod(like.shape[-axes:]) > most:
        return f"rows are longer than {most}"
    return None if like.numel() >= least else f"there are fewer than {least} elements"


def run(arena: Arena, program: Program, operands: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Results of a program on ``operands``, which broadcast to ``like``; shaped and laid out as that."""
    narrow = narrowed(like.shape, program.row_axes)
    results = [arena.empty(like, *narrow) if one else arena.blank(like) for one in program.per_row]
    write(program, operands, like, results)
    return results


def write(program: Program, operands: Sequence[Tensor], like: Tensor, results: Sequence[Tensor]) -> None:
    """Run a program, with its results in memory that is given; that of an operand that no row is taken of will do."""
    if like.is_meta or like.numel() == 0:  # shapes are all that is wanted
        return
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda axis: -strides[axis])  # as elements lie in memory
    spread = [x.expand(like.shape) for x in operands]
    given = [(x.data_ptr(), [x.stride(axis) for axis in order]) for x in spread]
    program.compiled.run(
        like.dtype is torch.float64,
        [like.shape[axis] for axis in order],
        given,
        [x.data_ptr() for x in results],
        torch.get_num_threads(),
        prod(like.shape[like.ndim - program.row_axes :]),
    )
