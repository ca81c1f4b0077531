"""By Triton: signs are hashed where they are written; norms of parts and of their sum take one read of each part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.generated import DTYPES, HEAD, available, elsewhere, launch_grid, load
from dag_hesse.kernels.probe.reference import BITS, GAMMA, MIX, signed

WORDS = 32  # of an instance
PIECE, PIECES = 1024, 16  # elements that an instance adds up at a time, and how often

_HASH = "\n".join(
    ["@triton.jit", "def _mix(z):"]
    + [f"    z = (z ^ ((z >> {s}) & {(1 << BITS - s) - 1})) * {factor}" for s, factor in MIX]
    + ["    return z"]
)
SIGNS = f"""{HEAD}{_HASH}


@triton.jit(do_not_specialize=["key", "first"])
def kernel(p_out, key, first, size, WORDS: tl.constexpr):
    probe = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    of_probe = _mix(key.to(tl.int64) + (first + probe + 1) * {GAMMA})
    bits = _mix(of_probe + (word + 1) * {GAMMA})
    bit = tl.arange(0, {BITS})
    at = word[:, None] * {BITS} + bit[None, :]
    sign = ((bits[:, None] >> bit[None, :]) & 1) * 2 - 1
    tl.store(p_out + probe * size + at, sign.to(p_out.dtype.element_ty), mask=at < size)
"""


def _squares(parts: int) -> str:
    """Sums of squares of an instance's share: instances are added up by PyTorch, in the same order every time."""
    names = [f"x{k}" for k in range(parts)]
    sums = [f"{n} * {n}" for n in names] + (["(x0 + x1) * (x0 + x1)"] if parts > 1 else [])
    strides = ", ".join(f"probe_{n}, group_{n}" for n in names)
    loads = "\n".join(
        f"        {n} = tl.load(p_{n} + probe * probe_{n} + group * group_{n} + at, mask=at < size, other=0.0)"
        ".to(tl.float64)"
        for n in names
    )
    starts = "\n".join(f"    s{k} = tl.zeros([PIECE], tl.float64)" for k in range(len(sums)))
    adds = "\n".join(f"        s{k} += {x}" for k, x in enumerate(sums))
    places = [f"p_out + ({k} * tl.num_programs(0) + row) * tl.num_programs(1) + share" for k in range(len(sums))]
    stores = "\n".join(f"    tl.store({place}, tl.sum(s{k}, 0))" for k, place in enumerate(places))
    pointers = ", ".join(f"p_{n}" for n in names)
    return f"""{HEAD}
@triton.jit
def kernel({pointers}, p_out, size, groups, {strides}, PIECE: tl.constexpr, PIECES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1).to(tl.int64)
    probe = row // groups
    group = row % groups
{starts}
    for piece in range(PIECES):
        at = (share * PIECES + piece) * PIECE + tl.arange(0, PIECE)
{loads}
{adds}
{stores}
"""


@cache
def compiled(parts: int) -> Any:
    """The kernel of signs (0), or that of squares of one part or two."""
    return load(_squares(parts) if parts else SIGNS, "kernel")


def refuse_signs(key: int, first: int, shape: Sequence[int], like: Tensor) -> str | None:
    """Why signs are not drawn here."""
    if reason := elsewhere(like):
        return reason
    if like.dtype not in DTYPES or not prod(shape):
        return "there are none, or they are no floating-point numbers"
    return available()


def signs(arena: Arena, key: int, first: int, shape: Sequence[int], like: Tensor) -> Tensor:
    found, size = arena.empty(like, *shape), prod(shape[1:])
    grid = (-(-size // (WORDS * BITS)), shape[0])
    launch_grid(compiled(0), grid, like.device, found, signed(key), first, size, WORDS=WORDS)
    return found


def refuse_squares(parts: Sequence[Tensor]) -> str | None:
    """Why norms are not taken here."""
    like = parts[0]
    if reason := elsewhere(like):
        return reason
    if any(x.dtype not in DTYPES or x.shape != like.shape or not x.numel() for x in parts):
        return "parts are empty, differ in shape, or have no floating-point numbers"
    if any(x.stride(2) != 1 and x.shape[2] > 1 for x in parts):
        return "the elements of a vector do not lie beside each other"
    return available()


def squares(arena: Arena, parts: Sequence[Tensor]) -> Tensor:
    probes, groups, size = parts[0].shape
    instances, norms = -(-size // (PIECE * PIECES)), 3 if len(parts) > 1 else 1
    out = torch.empty(norms, probes, groups, instances, dtype=torch.float64, device=parts[0].device)
    strides = [s for x in parts for s in x.stride()[:2]]
    given = (*parts, out, size, groups, *strides)
    launch_grid(compiled(len(parts)), (probes * groups, instances), out.device, *given, PIECE=PIECE, PIECES=PIECES)
    return out.sum(-1)
