"""Elementwise programs in one pass over memory; recorded from plain torch code, run by the C++ extension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, is_dense
from dag_hesse.kernels.elementwise.program import Builder, Program
from dag_hesse.kernels.elementwise.recorder import Recording, Refused, record

_LEAST = 1 << 12  # elements; a pass over fewer costs less than to set a program up


def refusal(operands: Sequence[Tensor], like: Tensor) -> str | None:
    """Why a program cannot be run on these tensors, or is not worth it; None if it can."""
    if like.device.type not in ("cpu", "meta") or like.dtype not in (torch.float32, torch.float64):
        return f"programs run on CPU tensors of float32 or float64, not {like.device.type} and {like.dtype}"
    if any(x.dtype != like.dtype or x.device != like.device for x in operands):
        return "operands differ in dtype or device"
    if not is_dense(like):
        return "the results' layout has gaps"
    return None if like.numel() >= _LEAST else f"there are fewer than {_LEAST} elements"


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


__all__ = ["Builder", "Program", "Recording", "Refused", "record", "refusal", "run"]
