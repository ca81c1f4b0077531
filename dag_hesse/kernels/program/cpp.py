"""By the C++ extension: one pass over memory, in all threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, is_dense
from dag_hesse.kernels.machine import machine
from dag_hesse.kernels.program.build import Program


def refuse(program: Program | None, operands: Sequence[Tensor], like: Tensor) -> str | None:
    """Why a program cannot be run on these tensors, or is not worth it; None if it can."""
    if like.device.type not in ("cpu", "meta") or like.dtype not in (torch.float32, torch.float64):
        return f"programs run on CPU tensors of float32 or float64, not {like.device.type} and {like.dtype}"
    if any(x.dtype != like.dtype or x.device != like.device for x in operands):
        return "operands differ in dtype or device"
    if not is_dense(like):
        return "the results' layout has gaps"
    least = machine(like.device).program
    return None if like.numel() >= least else f"there are fewer than {least} elements"


def run(arena: Arena, program: Program, operands: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Results of a program on ``operands``, which broadcast to ``like``; shaped and laid out as that."""
    results = [arena.blank(like) for _ in range(program.results)]
    if like.is_meta:  # shapes are all that is wanted
        return results
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
    )
    return results
