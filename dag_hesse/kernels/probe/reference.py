"""The definitions.

Signs come from a counter: element i of probe n is bit i mod 64 of word i // 64, and a word is a hash of (key, n, word)
by the finalizer of SplitMix64 (Steele, Lea, Flood, 2014). Whatever draws them, in whatever pieces, they are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena

BITS = 64


def signed(x: int) -> int:
    """An integer modulo 2⁶⁴ as int64 has it."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


GAMMA = signed(0x9E3779B97F4A7C15)
MIX = ((30, signed(0xBF58476D1CE4E5B9)), (27, signed(0x94D049BB133111EB)), (31, 1))  # shift, then multiply


def mix(z: Tensor) -> Tensor:
    """A hash of int64, modulo 2⁶⁴."""
    for shift, factor in MIX:
        z = (z ^ ((z >> shift) & ((1 << BITS - shift) - 1))) * factor  # a shift that brings in zeros
    return z


def words(key: int, first: int, probes: int, count: int, device: torch.device) -> Tensor:
    """Random bits (probes, count), int64, of the probes from number ``first`` on."""

    def numbers(start: int, size: int) -> Tensor:
        return torch.arange(start + 1, start + 1 + size, dtype=torch.int64, device=device) * GAMMA

    return mix(mix(numbers(first, probes) + signed(key))[:, None] + numbers(0, count))


def signs(arena: Arena, key: int, first: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """Random signs (probes, groups, dim) of a key, of the probes from number ``first`` on, in the type of ``like``."""
    size = prod(shape[1:])
    found = words(key, first, shape[0], -(-size // BITS), like.device)
    bits = (found[..., None] >> torch.arange(BITS, device=like.device)) & 1
    return (2 * bits - 1).flatten(1)[:, :size].reshape(*shape).to(like.dtype)


def squares(arena: Arena, parts: Sequence[Tensor]) -> Tensor:
    """Squared norms of one part or two, (probes, groups, dim) each, and of the sum of two: (1 or 3, probes, groups)."""
    whole = [*parts, parts[0] + parts[1]] if len(parts) > 1 else parts
    return torch.stack([x.double().pow(2).sum(-1) for x in whole])
