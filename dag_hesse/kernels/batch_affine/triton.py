"""By Triton: maps as sums of products with a number per image channel, and sums of a channel by tiles of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena, is_dense
from dag_hesse.kernels.elementwise.triton import Spread, Sums
from dag_hesse.kernels.generated import DTYPES, HEAD, available, computed, elsewhere, launch_grid, load, loop

TILE = 1024  # elements of an instance at a time
_LEAST = 1024  # instances that keep a GPU busy
_MOST = 1 << 31  # elements whose channel is found by a multiplication


def source(dtype: str) -> str:
    """Triton code of :func:`sums`: an instance has a channel of some samples, ``N`` of them at a time."""
    return f"""{HEAD}
@triton.jit
def kernel(p_g, p_x, p_mean, p_r, p_out, batch, channels, inner, g_row, x_row, N: tl.constexpr, I: tl.constexpr,
           STEP: tl.constexpr):
    T: tl.constexpr = {dtype}
    channel = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    mean = tl.load(p_mean + channel).to(T)
    turned = tl.zeros([N, I], T)
    total = tl.zeros([N, I], T)
    first = tl.program_id(1) * N
    {loop("start", "first", "batch", "STEP")}
        sample = start + tl.arange(0, N)[:, None]
        {loop("column", "0", "inner", "I")}
            place = column + tl.arange(0, I)[None, :]
            mask = (sample < batch) & (place < inner)
            at = (sample.to(tl.int64) * channels + channel) * inner + place
            g = tl.load(p_g + row * g_row + at, mask=mask, other=0.0).to(T)
            x = tl.load(p_x + row * x_row + at, mask=mask, other=0.0).to(T)
            turned += g * (x - mean)
            total += g
    to = p_out + (tl.program_id(1) * tl.num_programs(2) + row) * 2 * channels + channel
    tl.store(to, tl.sum(tl.sum(turned, 1), 0) * tl.load(p_r + channel).to(T))
    tl.store(to + channels, tl.sum(tl.sum(total, 1), 0))
"""


@cache
def compiled(dtype: str) -> Any:
    """The kernel of sums, computed in ``dtype``."""
    return load(source(dtype), "kernel")


def _reason(whole: Sequence[Tensor | None], numbers: Sequence[Tensor | None]) -> str | None:
    """Why these operands, (*x), and numbers, (…, channels), are not computed with here."""
    given = [x for x in whole if x is not None]
    like, channels = given[0], [x for x in numbers if x is not None]
    if reason := elsewhere(like):
        return reason
    if like.dtype not in DTYPES or any(x.dtype != like.dtype for x in (*given, *channels)):
        return "operands differ in dtype, or are no floating-point tensors"
    if not 0 < like.numel() < _MOST:
        return "there are no elements, or too many"
    if any(x.shape != like.shape or x.stride() != like.stride() for x in given):
        return "operands are broadcast, or lie otherwise than the first"
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in channels):
        return "the channels' numbers do not lie beside each other"
    return available()


def inner_of(x: Tensor) -> int | None:
    """How many elements of a channel lie beside each other; None where that differs, or there are gaps."""
    if x.is_contiguous():
        return prod(x.shape[2:])
    return 1 if x.movedim(1, -1).is_contiguous() else None


def _lies(x: Tensor) -> str | None:
    return None if is_dense(x) and inner_of(x) is not None else "x lies neither channels first nor channels last"


def refuse_sums(g: Tensor, x: Tensor, mean: Tensor, r: Tensor, var: Tensor, eps: float) -> str | None:
    reason = _reason([g[0], x[0]], [mean, r])
    if reason is None and not g[0].is_contiguous():
        return "the elements of a channel do not lie beside each other"
    return reason


def sums(arena: Arena, g: Tensor, x: Tensor, mean: Tensor, r: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, batch, channels = max(len(g), len(x)), *g.shape[1:3]
    inner = prod(g.shape[3:])
    columns = min(TILE, 1 << (inner - 1).bit_length())
    samples = min(TILE // columns, 1 << (batch - 1).bit_length())
    shares = max(1, min(-(-batch // samples), -(-_LEAST // (channels * rows))))
    dtype = computed(g.dtype)
    wide = torch.float64 if dtype == "tl.float64" else torch.float32
    out = torch.empty(shares, rows, 2, channels, dtype=wide, device=g.device)
    steps = [0 if len(t) == 1 else t.stride(0) for t in (g, x)]
    given = (g, x, mean, r, out, batch, channels, inner, *steps)
    launch_grid(
        compiled(dtype), (channels, shares, rows), g.device, *given, N=samples, I=columns, STEP=samples * shares
    )
    turned, total = out.sum(0).to(g.dtype).unbind(1)
    return turned, total


def refuse_tangent(
    gain: Tensor, xdot: Tensor | None, x: Tensor, scale: Tensor | None, shift: Tensor | None
) -> str | None:
    if xdot is None and scale is None:
        return "numbers alone need no kernel"
    return _reason([x, None if xdot is None else xdot[0]], [gain, scale, shift]) or _lies(x)


def tangent(
    arena: Arena, gain: Tensor, xdot: Tensor | None, x: Tensor, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    made, inner = Sums(x), inner_of(x) or 1
    terms = [] if xdot is None else [made.term(Spread(gain, inner), xdot)]
    terms += [] if scale is None else [made.term(x, Spread(scale, inner))]
    terms += [] if shift is None else [made.term(1.0, Spread(shift, inner))]
    made.results.append(tuple(terms))
    return made.run(len(next(t for t in (xdot, scale) if t is not None)), slice(None))[0]


def refuse_adjoint(
    gain: Tensor, abar: Tensor | None, lam: Tensor | None, share: Tensor | None, rows: slice
) -> str | None:
    whole = [None if t is None else t[0] for t in (abar, lam)]
    return _reason(whole, [gain, share]) or next((_lies(x) for x in whole if x is not None), None)


def adjoint(
    arena: Arena, gain: Tensor, abar: Tensor | None, lam: Tensor | None, share: Tensor | None, rows: slice
) -> Tensor:
    lead = next(t for t in (abar, lam) if t is not None)
    made, inner = Sums(lead[0]), inner_of(lead[0]) or 1
    terms = [] if abar is None else [made.term(Spread(gain, inner), abar)]
    count, of = (len(share), slice(None)) if abar is None and share is not None else (len(lead), rows)
    terms += [] if lam is None or share is None else [made.term(lam[0], Spread(share, inner), True)]
    made.results.append(tuple(terms))
    return made.run(count, of)[0]


__all__ = ["adjoint", "compiled", "refuse_adjoint", "refuse_sums", "refuse_tangent", "source", "sums", "tangent"]
