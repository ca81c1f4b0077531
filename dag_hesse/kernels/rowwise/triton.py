"""By one generated Triton kernel a node: both channels and all probes, each operand read once.

Rows of x lie one behind the other in memory, without gaps, and all operands lie alike; other layouts are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from dag_hesse.kernels.arena import Arena, is_dense
from dag_hesse.kernels.generated import DTYPES, available, computed, elsewhere, launch_grid
from dag_hesse.kernels.rowwise.forms import TERMS, Form, compiled, names, shape
from dag_hesse.kernels.rowwise.reference import Adjoint, Means, Pair, Tensors

ALL = slice(None)


def _strides(x: Tensor) -> tuple[int, ...]:
    """0 along axes of one element, which lie anywhere."""
    return tuple(s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))


def _reason(whole: Sequence[Tensor | None], numbers: Sequence[Tensor], dims: list[int]) -> str | None:
    """Why rows of these operands, (*x), the first of which all others follow, are not computed here."""
    given = [x for x in whole if x is not None]
    like = given[0]
    if reason := elsewhere(like):
        return reason
    if like.dtype not in DTYPES or any(x.dtype != like.dtype for x in (*given, *numbers)):
        return "operands differ in dtype, or are no floating-point tensors"
    if not like.numel() or not dims or not is_dense(like):
        return "x is empty, a number, or has gaps"
    if sum((like.shape[d] - 1) * like.stride(d) for d in dims) != _length(like, dims) - 1:
        return "the elements of a row do not lie beside each other"
    if any(x.shape != like.shape or _strides(x) != _strides(like) for x in given):
        return "operands are broadcast, or lie otherwise than the first"
    if any(x.shape != _kept(like, dims) or _strides(x) != _row_strides(like, dims) for x in numbers):
        return "numbers lie otherwise than the rows that they belong to"
    return available()


def _length(like: Tensor, dims: list[int]) -> int:
    return prod(like.shape[d] for d in dims)


def _kept(like: Tensor, dims: list[int]) -> tuple[int, ...]:
    """Shape of numbers, one a row."""
    return tuple(1 if k - like.ndim in dims else n for k, n in enumerate(like.shape))


def _row_strides(like: Tensor, dims: list[int]) -> tuple[int, ...]:
    """Strides of numbers, one a row."""
    length = _length(like, dims)
    return tuple(0 if n == 1 else s // length for s, n in zip(like.stride(), _kept(like, dims), strict=True))


def _run(
    arena: Arena,
    first: str | None,
    second: str | None,
    operands: dict[str, Tensor],
    rows: slice,
    dims: list[int],
    into: Tensor | None = None,
) -> list[Tensor]:
    """Results of terms on operands by name; ``rows`` are those of the second one's channel."""
    form = Form(first, second, into is not None, False, "")
    shared, moving, _ = names(form)
    term = TERMS[first or second or ""]
    like, lead = operands[term.shared[0]], operands[term.moving[0]]
    count, length = len(lead), _length(like, dims)
    out = [arena.empty_as(lead, like) if into is None else into for _ in term.results]
    out += [_numbers(arena, lead, like, dims) for _ in term.number_results]
    dtype = computed(like.dtype)
    how, of_x = shape(length, dtype), like.numel() // length
    start, stop, _ = (rows if first else ALL).indices(count)
    given = [operands[n] for n in (*shared, *moving)]
    strides = [x.stride(0) for x in (*(operands[n] for n in moving), *out)]
    launch_grid(
        compiled(form._replace(looped=how.looped, dtype=dtype)),
        (of_x * count if how.looped else -(-of_x // how.rows),),
        like.device,
        *(*given, *out, length, of_x, start, stop, *strides),
        ROWS=count,
        M=how.rows,
        N=how.columns,
        num_warps=how.warps,
    )
    return out


def _numbers(arena: Arena, lead: Tensor, like: Tensor, dims: list[int]) -> Tensor:
    """Uninitialized, one number a row of x and probe."""
    kept = _kept(like, dims)
    return arena.empty(lead, len(lead) * prod(kept)).as_strided(
        (len(lead), *kept), (prod(kept), *_row_strides(like, dims))
    )


def _first(*given: Tensor | None) -> list[Tensor | None]:
    """One row of each operand that has rows."""
    return [None if x is None else x[0] for x in given]


def refuse_softmax_tangent(y: Tensor, x: Tensor, dims: list[int]) -> str | None:
    return _reason([y, x[0]], [], dims)


def softmax_tangent(arena: Arena, y: Tensor, x: Tensor, dims: list[int]) -> Pair:
    moved, centered = _run(arena, "softmax tangent", None, {"y": y, "x": x}, ALL, dims)
    return moved, centered


def refuse_softmax_adjoints(y: Tensor, a: Adjoint, dims: list[int]) -> str | None:
    mu, w = a.second or (None, None)
    return _reason([y, mu, *_first(a.g, w, a.into)], [], dims)


def softmax_adjoints(arena: Arena, y: Tensor, a: Adjoint, dims: list[int]) -> Tensor:
    return _adjoints(arena, "softmax", a, {"y": y}, ("mu", "w"), dims)


def refuse_log_softmax_tangent(p: Tensor, x: Tensor, dims: list[int]) -> str | None:
    return _reason([p, x[0]], [], dims)


def log_softmax_tangent(arena: Arena, p: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    return _run(arena, "log_softmax tangent", None, {"p": p, "x": x}, ALL, dims)[0]


def refuse_log_softmax_adjoints(p: Tensor, a: Adjoint, dims: list[int]) -> str | None:
    total, w = a.second or (None, None)
    return _reason([p, *_first(a.g, w, a.into)], [] if total is None else [total], dims)


def log_softmax_adjoints(arena: Arena, p: Tensor, a: Adjoint, dims: list[int]) -> Tensor:
    return _adjoints(arena, "log_softmax", a, {"p": p}, ("total", "w"), dims)


def _standardize(center: bool) -> str:
    return "standardize centered" if center else "standardize"


def _named(names: Sequence[str], tensors: Sequence[Tensor | None] | None) -> dict[str, Tensor]:
    return {name: x for name, x in zip(names, tensors or (), strict=False) if x is not None}


def _adjoints(
    arena: Arena,
    name: str,
    a: Adjoint,
    operands: dict[str, Tensor],
    of_second: Sequence[str],
    dims: list[int],
    second: str = "",
) -> Tensor:
    """By the terms ``name``, of ``g``, and ``second``, of what is called ``of_second``."""
    operands = operands | _named(("g",), (a.g,)) | _named(of_second, a.second)
    terms = None if a.g is None else name, None if a.second is None else second or f"{name} second"
    return _run(arena, *terms, operands, a.rows, dims, a.into)[0]


def refuse_standardize_tangent(y: Tensor, r: Tensor, mu: Tensor | None, x: Tensor, how: Means) -> str | None:
    return _reason([y, mu, x[0]], [r], how.dims)


def standardize_tangent(arena: Arena, y: Tensor, r: Tensor, mu: Tensor | None, x: Tensor, how: Means) -> Tensors:
    operands = {"y": y, "r": r, "g": x} | _named(("mu",), (mu,))
    name = _standardize(how.center) + ("" if mu is None else " tangent")
    return tuple(_run(arena, name, None, operands, ALL, how.dims))


def refuse_standardize_adjoints(y: Tensor, r: Tensor, a: Adjoint, how: Means) -> str | None:
    mu, c, w, of_mu, of_y = a.second or (None,) * 5
    return _reason(
        [y, mu, *_first(a.g, w, a.into)], [r, *(x for x in (c, *_first(of_mu, of_y)) if x is not None)], how.dims
    )


def standardize_adjoints(arena: Arena, y: Tensor, r: Tensor, a: Adjoint, how: Means) -> Tensor:
    names = ("mu", "c", "w", "a", "b")
    return _adjoints(arena, _standardize(how.center), a, {"y": y, "r": r}, names, how.dims, "standardize second")
