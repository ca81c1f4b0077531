"""Products of float32 operands on tensor cores, by Triton: as accurate as the vendor's, and about twice as fast.

An operand is the sum of two TF32 numbers but for 2⁻²³ of it, x = x₁ + x₂, so a product is x₁y₁ + x₁y₂ + x₂y₁ but for
as much. Tensor cores cut off what they add up, so no more than ``DEPTH`` terms are left to them: sums over longer rows
are taken in float32. The smaller operand is taken apart beforehand, and turned, as tensor cores want it; the other one
in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.contraction.by_product import outer_by, refuse_outer_by
from dag_hesse.kernels.generated import HEAD, available, elsewhere, interpreted, launch_grid, load, loop
from dag_hesse.kernels.machine import machine
from dag_hesse.measure import rounds_to_tf32

DEPTH = 32  # terms of a sum that tensor cores add up
STAGES = 3
_PIECE = 32  # rows and columns that are taken apart by an instance
_MOST = 1 << 31  # elements that a matrix spans, whose places take 32 bits
_BATCH = 1 << 16  # matrices


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the result that an instance makes.

    ``resident`` instances share a multiprocessor. ``gain`` is how much faster than the vendor's float32 products they
    are together, where all multiprocessors of an H200 are busy: 93 against 48 TFLOP/s for the largest.
    """

    rows: int
    columns: int
    warps: int
    resident: int
    gain: float


TILES = (Tile(128, 128, 8, 1, 1.9), Tile(128, 64, 4, 2, 1.8), Tile(64, 128, 4, 2, 1.8), Tile(64, 64, 4, 3, 1.7))

ROUNDED = """
@triton.jit
def rounded(x):
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
"""  # to 11 bits, the nearest. The rest is not rounded: NaN survives in it, and tensor cores read its first 11 bits.


def source() -> str:
    """Triton code of the product: ``p_to`` = (what is there +) x yᵀ, where y is ``p_high`` + ``p_low``."""
    return f"""{HEAD}{ROUNDED}
@triton.jit
def kernel(p_x, p_high, p_low, p_to, rows, columns, terms, x_row, x_term, y_column, to_row, to_column, inner,
           x_outer, x_inner, y_outer, y_inner, to_outer, to_inner, ADDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
           K: tl.constexpr):
    outer_at = (tl.program_id(1) // inner).to(tl.int64)
    inner_at = (tl.program_id(1) % inner).to(tl.int64)
    y_at = outer_at * y_outer + inner_at * y_inner
    across = tl.cdiv(columns, N)
    down = tl.cdiv(rows, M)
    group = tl.program_id(0) // (8 * across)  # tiles of 8 rows of tiles follow each other: they read the same operands
    high_group = min(down - group * 8, 8)
    r = (group * 8 + tl.program_id(0) % (8 * across) % high_group) * M + tl.arange(0, M)
    c = (tl.program_id(0) % (8 * across) // high_group) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    m_r = r < rows
    m_c = c < columns
    x_at = p_x + (outer_at * x_outer + inner_at * x_inner) + (r[:, None] * x_row + k[None, :] * x_term)
    y_place = c[:, None] * y_column + k[None, :]
    total = tl.zeros([M, N], tl.float32)
    {loop("start", "0", "terms", "K")}
        x = tl.load(x_at + start * x_term, mask=m_r[:, None] & (k < terms - start)[None, :], other=0.0)
        high = tl.load(p_high + y_at + start + y_place, mask=m_c[:, None], other=0.0).T
        low = tl.load(p_low + y_at + start + y_place, mask=m_c[:, None], other=0.0).T
        x_high = rounded(x)
        part = tl.dot(x - x_high, high, input_precision="tf32")
        part = tl.dot(x_high, low, part, input_precision="tf32")
        total += tl.dot(x_high, high, part, input_precision="tf32")
    to = p_to + (outer_at * to_outer + inner_at * to_inner) + (r[:, None] * to_row + c[None, :] * to_column)
    if ADDS:
        total += tl.load(to, mask=m_r[:, None] & m_c[None, :], other=0.0)
    tl.store(to, total, mask=m_r[:, None] & m_c[None, :])
"""


def source_apart() -> str:
    """Triton code that takes matrices (outer, inner, rows, terms) apart into two, whose rows end in zeros."""
    return f"""{HEAD}{ROUNDED}
@triton.jit
def kernel(p_x, p_high, p_low, rows, terms, padded, inner, x_outer, x_inner, x_row, x_term, SIZE: tl.constexpr):
    matrix = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    k = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    m_r = r[:, None] < rows
    place = matrix // inner * x_outer + matrix % inner * x_inner + (r[:, None] * x_row + k[None, :] * x_term)
    x = tl.load(p_x + place, mask=m_r & (k[None, :] < terms), other=0.0)
    high = rounded(x)
    to = matrix * rows * padded + (r[:, None] * padded + k[None, :])
    tl.store(p_high + to, high, mask=m_r)
    tl.store(p_low + to, x - high, mask=m_r)
"""


@cache
def compiled() -> Any:
    """The kernel of products."""
    return load(source(), "kernel")


@cache
def compiled_apart() -> Any:
    """The kernel that takes operands apart."""
    return load(source_apart(), "kernel")


def _views(a: Tensor, b: Tensor, to: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of ``to`` = a @ b as (outer, inner, n, m); probes that share b are rows of one matrix."""
    if a.ndim == 4:
        return a, b, to
    if len(b) == 1 and len(a) > 1 and a.is_contiguous() and (to is None or to.is_contiguous()):
        a, to = a.view(1, -1, a.shape[-1]), None if to is None else to.view(1, -1, to.shape[-1])
    return a.unsqueeze(1), b.unsqueeze(1), None if to is None else to.unsqueeze(1)


def _shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    return (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])


def _alone(x: Tensor) -> Tensor:
    """Matrices that differ: axes that repeat one of them are of size 1."""
    for axis in (0, 1):
        if x.stride(axis) == 0:
            x = x.narrow(axis, 0, 1)
    return x


def _turns(x: Tensor, y: Tensor) -> bool:
    """Whether x y is made as the transpose of yᵀ xᵀ: the smaller operand is what is taken apart."""
    return _alone(x).numel() < _alone(y).numel()


def _steps(x: Tensor) -> list[int]:
    """Elements between matrices, along the outer axis and the inner one; 0 where all share one."""
    return [0 if x.shape[axis] == 1 else x.stride(axis) for axis in (0, 1)]


def _span(x: Tensor) -> int:
    """Elements of memory from the first of a matrix to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True))


@cache
def _card(device: torch.device) -> tuple[int, int]:
    """Generation, and number of multiprocessors."""
    found = torch.cuda.get_device_properties(device)
    return found.major, found.multi_processor_count


@cache
def tile(count: int, rows: int, columns: int, processors: int) -> tuple[Tile, float]:
    """The tile that ``count`` products of so many rows and columns are made in, and its gain with what is idle counted.

    Examples:
        >>> one, gain = tile(1, 4096, 3072, 132)
        >>> one.rows, one.columns, round(gain, 1)
        (128, 128, 1.8)
        >>> tile(1, 768, 768, 132)[1] < 1
        True
    """

    def reached(one: Tile) -> float:
        places, tiles = processors * one.resident, count * -(-rows // one.rows) * -(-columns // one.columns)
        return one.gain * count * rows * columns / (-(-tiles // places) * places * one.rows * one.columns)

    best = max(TILES, key=reached)
    return best, reached(best)


def refuse_product(a: Tensor, b: Tensor, into: Tensor | None) -> str | None:
    given = [a, b] if into is None else [a, b, into]
    if reason := elsewhere(a):
        return reason
    if any(x.dtype is not torch.float32 for x in given):
        return "operands are not float32"
    if a.ndim not in (3, 4) or any(x.ndim != a.ndim for x in given):
        return "operands have other axes than one of rows and one of matrices"
    if any(1 not in x.stride()[-2:] for x in given):
        return "no axis of a matrix lies side by side"
    if not all(x.numel() for x in given):
        return "there are no elements"
    x, y, to = _views(a, b, into)
    count, sides, terms = prod(_shape(x, y)[:2]), (x.shape[2], y.shape[3]), x.shape[3]
    spans = [_span(x), _span(y), prod(sides) if to is None else _span(to)]
    if count >= _BATCH or terms >= _BATCH * _PIECE or max(*spans, max(sides) * (terms + DEPTH)) >= _MOST:
        return "there are too many matrices, or too large ones"
    rows, columns = sides[::-1] if _turns(x, y) else sides
    return _slower(count, rows, columns, terms, a.device) or available()


def _slower(count: int, rows: int, columns: int, terms: int, device: torch.device) -> str | None:
    """Why the vendor's product is to be preferred."""
    if interpreted():
        return None
    generation, processors = _card(device)
    if generation != 9:
        return "it was measured on Hopper alone"
    if rounds_to_tf32():
        return "TF32 is allowed, and the vendor's products use it"
    if terms < DEPTH:
        return f"there are fewer than {DEPTH} terms"
    _, gain = tile(count, rows, columns, processors)
    return None if gain >= machine(device).gain else "too few tiles keep the device busy"


def product(arena: Arena, a: Tensor, b: Tensor, into: Tensor | None) -> Tensor:
    to = arena.empty(a, *_shape(a, b)) if into is None else into
    x, y, place = _views(a, b, to)
    assert place is not None
    if _turns(x, y):
        x, y, place = y.mT, x.mT, place.mT
    _write(arena, x, y.mT, place, into is not None)
    return to


def _write(arena: Arena, x: Tensor, y: Tensor, to: Tensor, adds: bool) -> None:
    """x yᵀ of x (outer, inner, rows, terms) and y (outer, inner, columns, terms); axes of size 1 are shared."""
    outer, inner, rows, columns = to.shape
    high, low, steps = _apart(arena, y)
    one = TILES[-1] if interpreted() else tile(outer * inner, rows, columns, _card(x.device)[1])[0]
    grid = (-(-rows // one.rows) * -(-columns // one.columns), outer * inner)
    launch_grid(
        compiled(), grid, x.device, x, high, low, to, rows, columns, x.shape[3], *x.stride()[2:], high.shape[-1],
        *to.stride()[2:], inner, *_steps(x), *steps, *_steps(to), ADDS=adds, M=one.rows, N=one.columns, K=DEPTH,
        num_warps=one.warps, num_stages=STAGES,
    )  # fmt: skip


def _apart(arena: Arena, y: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Two matrices for each one that differs, rows padded with zeros; and the elements between matrices."""
    alone = _alone(y)
    outer, inner, rows, terms = alone.shape
    padded = -(-terms // DEPTH) * DEPTH
    high, low = arena.empty(y, 2, outer * inner, rows, padded).unbind()
    grid = (-(-rows // _PIECE), padded // _PIECE, outer * inner)
    launch_grid(
        compiled_apart(), grid, y.device, alone, high, low, rows, terms, padded, inner, *alone.stride(), SIZE=_PIECE
    )
    step = rows * padded
    return high, low, [0 if outer == 1 else inner * step, 0 if inner == 1 else step]


outer = outer_by(product)
refuse_outer = refuse_outer_by(refuse_product)

__all__ = [
    "DEPTH",
    "STAGES",
    "TILES",
    "Tile",
    "compiled",
    "compiled_apart",
    "outer",
    "product",
    "refuse_outer",
    "refuse_product",
    "tile",
]
