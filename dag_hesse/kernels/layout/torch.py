"""Copies to the arena, some cells of every image channel at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.machine import machine


def laid_out(arena: Arena, x: Tensor, layout: torch.memory_format) -> Tensor:
    if x.is_contiguous(memory_format=layout):
        return x
    if layout is not torch.contiguous_format:
        lead, channels, *side = x.shape
        return arena.empty(x, lead, *side, channels).movedim(-1, 1).copy_(x)
    found, cells = arena.empty(x, *x.shape), machine(x.device).cells
    if x.ndim < 4 or not x.movedim(1, -1).is_contiguous():
        return found.copy_(x)
    # An image channel's cells lie far apart: as many as the caches hold until the next channel, beside it, is read.
    for to, some in zip(found.flatten(2).split(cells, 2), x.flatten(2).split(cells, 2), strict=True):
        to.copy_(some)
    return found
