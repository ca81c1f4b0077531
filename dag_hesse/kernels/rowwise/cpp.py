"""By programs on rows, recorded from the definitions: one pass over memory, in all threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dag_hesse import native
from dag_hesse.kernels.arena import SYSTEM, Arena
from dag_hesse.kernels.machine import machine
from dag_hesse.kernels.program import Program, cpp, record
from dag_hesse.kernels.program.build import narrowed
from dag_hesse.kernels.rowwise import reference
from dag_hesse.kernels.rowwise.reference import Adjoint, Means, Pair, Tensors

Definition = Callable[..., Any]
How = list[int] | Means
_EXAMPLE = (2, 2)  # probes and rows


class Kind(NamedTuple):
    """Of an operand: whether it has probes, and whether whole rows or a number for each."""

    probes: bool
    whole: bool


def _dims(how: How) -> list[int]:
    return how.dims if isinstance(how, Means) else how


@cache
def _program(definition: Definition, kinds: tuple[Kind | None, ...], axes: int, center: bool | None) -> Program:
    """What a definition does to operands of these kinds; None stands for one that is not given."""
    full, dims = (*_EXAMPLE, *(2,) * axes), list(range(-axes, 0))
    how = dims if center is None else Means(dims, center, None)

    def code(*given: Tensor) -> dict[Any, Tensor]:
        rest = iter(given)
        found = definition(SYSTEM, *(None if kind is None else next(rest) for kind in kinds), how)
        return dict(enumerate(found if isinstance(found, tuple) else (found,)))

    shapes = [(full if k.whole else narrowed(full, axes))[0 if k.probes else 1 :] for k in kinds if k is not None]
    like, *examples = (torch.empty(shape, device="cpu") for shape in (full, *shapes))
    return record(code, examples, like, joined=True).program


def _planned(definition: Definition, operands: Sequence[Tensor | None], like: Tensor, how: How) -> Program:
    axes, center = len(_dims(how)), how.center if isinstance(how, Means) else None
    row = like.shape[like.ndim - axes :]
    kinds = [None if x is None else Kind(x.ndim == like.ndim, x.shape[x.ndim - axes :] == row) for x in operands]
    return _program(definition, tuple(kinds), axes, center)


def _tangent(definition: Definition, arena: Arena, *operands: Tensor | None, how: How) -> list[Tensor]:
    """Of operands the last of which has the shape of results."""
    given = [x for x in operands if x is not None]
    return cpp.run(arena, _planned(definition, operands, given[-1], how), given, given[-1])


@cache
def _flat(definition: Definition, kept: int) -> Definition:
    """Adjoints as a function of tensors: a buffer, what goes back, what the kernel keeps, second-order operands."""

    def flat(arena: Arena, into: Tensor | None, g: Tensor | None, *rest: Any) -> Tensor:
        own, second, how = rest[:kept], rest[kept:-1], rest[-1]
        found: Tensor = definition(arena, *own, Adjoint(g, second or None, into=into), how)
        return found

    return flat


def _parts(a: Adjoint, count: int) -> Iterator[tuple[slice, Tensors]]:
    """Rows that are alike, and their second-order operands."""
    if a.g is None or a.second is None:
        yield slice(None), a.second or ()
        return
    start, stop, _ = a.rows.indices(count)
    for first, last, second in ((0, start, ()), (start, stop, a.second), (max(start, stop), count, ())):
        if first < last:
            yield slice(first, last), second


def _adjoints(definition: Definition, arena: Arena, own: Tensors, a: Adjoint, how: How) -> Tensor:
    like, flat = _like(own[0], a), _flat(definition, len(own))
    found = arena.blank(like) if a.into is None else a.into
    for rows, second in _parts(a, len(like)):
        g, into = (None if x is None else x[rows] for x in (a.g, a.into))
        operands = (into, g, *own, *second)
        program = _planned(flat, operands, like[rows], how)
        cpp.write(program, [x for x in operands if x is not None], like[rows], [found[rows]])
    return found


def _like(value: Tensor, a: Adjoint) -> Tensor:
    """What has the result's shape."""
    given = (a.g,) if a.second is None else (a.g, *a.second)
    return next(x for x in given if x is not None and x.shape[1:] == value.shape and x.ndim > value.ndim)


def _refuse(like: Tensor, how: How, *operands: Tensor | None) -> str | None:
    axes = len(_dims(how))
    if native.core is None:
        return native.MISSING
    if sorted(_dims(how)) != list(range(-axes, 0)):
        return "rows are not of the last axes"
    return cpp.refuse(None, [x for x in operands if x is not None], like) or cpp.refuse_rows(like, axes)


def _refuse_adjoints(own: Tensors, a: Adjoint, how: How) -> str | None:
    if a.into is not None and not a.into.is_contiguous():
        return "the buffer's rows do not lie beside each other"
    return _refuse(_like(own[0], a), how, a.into, a.g, *own, *(a.second or ()))


def softmax_tangent(arena: Arena, y: Tensor, x: Tensor, dims: list[int]) -> Pair:
    moved, centered = _tangent(reference.softmax_tangent, arena, y, x, how=dims)
    return moved, centered


def log_softmax_tangent(arena: Arena, p: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    return _tangent(reference.log_softmax_tangent, arena, p, x, how=dims)[0]


def standardize_tangent(arena: Arena, y: Tensor, r: Tensor, mu: Tensor | None, x: Tensor, how: Means) -> Tensors:
    return tuple(_tangent(reference.standardize_tangent, arena, y, r, mu, x, how=how))


def softmax_adjoints(arena: Arena, y: Tensor, a: Adjoint, dims: list[int]) -> Tensor:
    return _adjoints(reference.softmax_adjoints, arena, (y,), a, dims)


def log_softmax_adjoints(arena: Arena, p: Tensor, a: Adjoint, dims: list[int]) -> Tensor:
    return _adjoints(reference.log_softmax_adjoints, arena, (p,), a, dims)


def standardize_adjoints(arena: Arena, y: Tensor, r: Tensor, a: Adjoint, how: Means) -> Tensor:
    return _adjoints(reference.standardize_adjoints, arena, (y, r), a, how)


def refuse_softmax_tangent(y: Tensor, x: Tensor, dims: list[int]) -> str | None:
    return _refuse(x, dims, y, x)


refuse_log_softmax_tangent = refuse_softmax_tangent


def _left_to_layer_norm(x: Tensor, how: Means) -> str | None:
    few = how.inner is not None and x.numel() < machine(x.device).norm
    return "PyTorch's LayerNorm is as fast" if few else None


def refuse_standardize_tangent(y: Tensor, r: Tensor, mu: Tensor | None, x: Tensor, how: Means) -> str | None:
    reason = _left_to_layer_norm(x, how) if mu is None else None
    return reason or _refuse(x, how, y, r, mu, x)


def refuse_softmax_adjoints(y: Tensor, a: Adjoint, dims: list[int]) -> str | None:
    return _refuse_adjoints((y,), a, dims)


refuse_log_softmax_adjoints = refuse_softmax_adjoints


def refuse_standardize_adjoints(y: Tensor, r: Tensor, a: Adjoint, how: Means) -> str | None:
    return _left_to_layer_norm(_like(y, a), how) or _refuse_adjoints((y, r), a, how)
