"""By PyTorch: eight signs are looked up at a time."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.probe.reference import BITS, words


def refuse_signs(key: int, first: int, shape: Sequence[int], like: Tensor) -> str | None:
    return "random bits have values" if like.is_meta else None


def signs(arena: Arena, key: int, first: int, shape: Sequence[int], like: Tensor) -> Tensor:
    size = prod(shape[1:])
    if not size or not shape[0]:
        return like.new_empty(*shape)
    bytes_of = words(key, first, shape[0], -(-size // BITS), like.device).view(torch.uint8)  # the lowest first
    numbers = torch.arange(256, device=like.device)[:, None] >> torch.arange(8, device=like.device)
    table = (2 * (numbers & 1) - 1).to(like.dtype)
    found = table.index_select(0, bytes_of.flatten().int())
    return found.view(shape[0], -1)[:, :size].reshape(*shape)
