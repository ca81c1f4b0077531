"""By the C++ extension: between image channels one behind the other and side by side, blocks of four by four at a time.

PyTorch copies element by element, where every other one lies in another line of the caches.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from dag_hesse import native
from dag_hesse.kernels.arena import Arena


def _gathered(x: Tensor) -> bool:
    """Whether the channels of a position lie side by side, and nothing else between positions."""
    return x.movedim(1, -1).is_contiguous()


def refuse(x: Tensor, layout: torch.memory_format) -> str | None:
    if x.is_contiguous(memory_format=layout):  # nothing is to be done
        return None
    if native.core is None:
        return native.MISSING
    if x.device.type != "cpu" or x.itemsize not in (4, 8):
        return "elements are not in main memory, or have neither 4 nor 8 bytes"
    if x.ndim < 3:
        return "there are no positions"
    dense = _gathered(x) if layout is torch.contiguous_format else x.is_contiguous()
    return None if dense else "it is another change of layouts"


def laid_out(arena: Arena, x: Tensor, layout: torch.memory_format) -> Tensor:
    if x.is_contiguous(memory_format=layout):
        return x
    batch, channels, *side = x.shape
    if layout is torch.contiguous_format:
        found, matrix = arena.empty(x, *x.shape), (prod(side), channels)
    else:
        found, matrix = arena.empty(x, batch, *side, channels).movedim(-1, 1), (channels, prod(side))
    native.core.transpose(x.data_ptr(), found.data_ptr(), batch, *matrix, x.itemsize, torch.get_num_threads())
    return found


__all__ = ["laid_out", "refuse"]
