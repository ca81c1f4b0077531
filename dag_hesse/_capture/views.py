"""Views as steps: what op leads from a tensor to one that shares its memory, and how it is written through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from dag_hesse.ir import ops

aten = torch.ops.aten
Geometry = tuple[tuple[int, ...], tuple[int, ...], int]


class Emitter(Protocol):
    """What makes nodes."""

    def emit(
        self, op: Callable[..., Any], args: Sequence[Any], like: Any, *, kwargs: dict[str, Any] | None = None
    ) -> int:
        """A node that runs ``op`` on ``args``, in which nodes are :class:`At`; ``like`` has its shape and dtype."""

    def constant(self, value: Tensor, name: str) -> int:
        """A leaf that holds ``value``."""

    def detach(self, node: int) -> int:
        """The value of a node, without its past."""

    def has_past(self, node: int) -> bool:
        """Whether derivatives pass the node."""

    def dtype(self, node: int) -> torch.dtype:
        """Of a node's value."""


@dataclass(frozen=True, slots=True)
class At:
    """Stands for a node among the arguments of an op."""

    node: int


@dataclass(frozen=True, slots=True)
class Like:
    """Shape and dtype of a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Step:
    """From a tensor to a view of it: ``op(tensor, *args)``; or, with ``index``, elements by their flat number."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    base: Like
    result: Like
    index: Tensor | None = None

    def take(self, to: Emitter, node: int) -> int:
        """The view of a node."""
        if self.index is None:
            return to.emit(self.op, (At(node), *self.args), self.result)
        flat = to.emit(aten.reshape.default, (At(node), [-1]), Like((prod(self.base.shape),), self.base.dtype))
        place = At(to.constant(self.index.reshape(-1), "index"))
        rows = Like((self.index.numel(),), self.result.dtype)
        picked = to.emit(aten.index_select.default, (At(flat), 0, place), rows)
        return to.emit(aten.reshape.default, (At(picked), list(self.result.shape)), self.result)

    def put(self, to: Emitter, node: int, value: int) -> int:
        """``node`` with its view replaced by ``value``."""
        scatter = _SCATTERS.get(self.op)
        if self.index is None and scatter is not None:
            return to.emit(scatter, (At(node), At(value), *self.args), self.base)
        if self.index is None and (self.op in _COMPLEX or prod(self.base.shape) == prod(self.result.shape)):
            back = _inverse(self)
            if back is not None:
                return to.emit(back[0], (At(value), *back[1]), self.base)
        index = self.index if self.index is not None else self.op(_numbers(self.base.shape), *self.args)
        flat = to.emit(aten.reshape.default, (At(node), [-1]), Like((prod(self.base.shape),), self.base.dtype))
        rows = to.emit(aten.reshape.default, (At(value), [-1]), Like((index.numel(),), self.base.dtype))
        place = At(to.constant(index.reshape(-1).clone(), "index"))
        put = to.emit(
            aten.index_put.default,
            (At(flat), [place], At(rows)),
            Like((prod(self.base.shape),), self.base.dtype),
        )
        return to.emit(aten.reshape.default, (At(put), list(self.base.shape)), self.base)


_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
_RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten._reshape_alias.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
    aten.detach.default,
    ops.tap,
}


_COMPLEX = {aten.view_as_real.default, aten.view_as_complex.default}


def _inverse(step: Step) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """The op and arguments that undo a step which loses nothing."""
    if step.op in _RESHAPES:
        return aten.reshape.default, (list(step.base.shape),)
    if step.op in (aten.t.default, aten.transpose.int):
        return step.op, step.args
    if step.op is aten.permute.default:
        dims = [d % len(step.base.shape) for d in step.args[0]]
        return aten.permute.default, ([dims.index(k) for k in range(len(dims))],)
    if step.op is aten.view_as_real.default:
        return aten.view_as_complex.default, ()
    if step.op is aten.view_as_complex.default:
        return aten.view_as_real.default, ()
    return None


def _numbers(shape: Sequence[int]) -> Tensor:
    return torch.arange(prod(shape), device="cpu").reshape(tuple(shape))


def _places(geometry: Geometry) -> Tensor:
    """Where in the storage every element lies."""
    shape, strides, offset = geometry
    place = torch.full(shape, offset, dtype=torch.int64, device="cpu")
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        place += (torch.arange(size, device="cpu") * stride).reshape(
            [-1 if k == axis else 1 for k in range(len(shape))]
        )
    return place


def _lies_in_order(geometry: Geometry) -> bool:
    expected = 1
    for size, stride in zip(reversed(geometry[0]), reversed(geometry[1]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def by_place(base: Tensor | Geometry, result: Tensor | Geometry, dtype: torch.dtype) -> Step | None:
    """The step between tensors of one storage, from where their elements lie; None if the base lacks some."""
    a, b = (geometry(x) if isinstance(x, Tensor) else x for x in (base, result))
    here, there = Like(a[0], dtype), Like(b[0], dtype)
    if a == b:
        return Step(aten.alias.default, (), here, here)
    if a[2] == b[2] and prod(a[0]) == prod(b[0]) and _lies_in_order(a) and _lies_in_order(b):
        return Step(aten.reshape.default, (list(b[0]),), here, there)
    have, want = _places(a).reshape(-1), _places(b)
    if not have.numel() or not want.numel():
        return None
    number = torch.full((int(torch.maximum(have.max(), want.max())) + 1,), -1, device="cpu")
    number[have] = _numbers(have.shape)
    index = number[want]
    if bool((index < 0).any()):
        return None
    if index.numel() == have.numel() and bool((index.reshape(-1) == _numbers(have.shape)).all()):
        return Step(aten.reshape.default, (list(b[0]),), here, there)
    return Step(aten.as_strided.default, (), here, there, index)


def geometry(x: Tensor) -> Geometry:
    """Shape, strides and offset."""
    return tuple(x.shape), x.stride(), int(x.storage_offset())


__all__ = ["At", "Emitter", "Geometry", "Like", "Step", "by_place", "geometry"]
