"""Which node holds a tensor's value: storages, the tensors that share them, and writes through views.

A storage has one value; the tensors on it may have different pasts (``x.detach()`` shares x's memory, not its history).
Tensors of one storage and one past are a *family*: a root, and views that are steps away from it. A write into a view
makes a new root; whoever is used later takes the steps again. Writes that autograd does not see (under ``no_grad``,
through ``.data``) change a value and keep its past: node ``dag_hesse.assigned``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

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


@dataclass(eq=False, slots=True)
class _Storage:
    ref: StorageWeakRef  # while it is there, the address names no other storage
    foreign: bool  # whether it was there before the forward ran
    version: int = 0
    writer: _Family | None = None


@dataclass(eq=False, slots=True)
class _Family:
    storage: _Storage
    node: int
    geometry: Geometry
    dtype: torch.dtype
    seen: int
    kin: object  # families with one kin tell each other of their pasts: a tensor, and a tap on it


@dataclass(eq=False, slots=True)
class _Alias:
    family: _Family
    steps: tuple[Step, ...]
    node: int
    seen: int
    geometry: Geometry
    detached: bool = False  # whether it was made without a past; autograd may still give it one (a saved output)


@dataclass(eq=False)
class Aliases:
    """Tensors met so far, and the nodes that hold their values."""

    to: Emitter
    storages: dict[int, _Storage] = field(default_factory=dict)
    tensors: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def storage(self, x: Tensor, foreign: bool) -> _Storage:
        """The storage of ``x``; ``foreign``: if it is new here, whether it was there before."""
        ref = StorageWeakRef(x.untyped_storage())
        found = self.storages.get(ref.cdata)
        if found is None:
            found = self.storages[ref.cdata] = _Storage(ref, foreign)
        return found

    def is_foreign(self, x: Tensor) -> bool:
        """Whether ``x`` lies where something was before the forward ran."""
        found = self.storages.get(x.untyped_storage()._cdata)
        return found is None or found.foreign

    def knows(self, x: Tensor) -> bool:
        """Whether ``x``, or what shares its storage, has been met."""
        return x in self.tensors or x.untyped_storage()._cdata in self.storages

    def add(self, x: Tensor, node: int, *, foreign: bool = False, kin: object = None) -> None:
        """``x`` is new, and ``node`` holds its value."""
        storage, shape = self.storage(x, foreign), geometry(x)
        family = _Family(storage, node, shape, x.dtype, storage.version, kin or object())
        storage.writer = storage.writer or family  # whoever is given this memory (``.data =``) finds its value there
        self.tensors[x] = _Alias(family, (), node, storage.version, shape)

    def add_view(self, x: Tensor, base: Tensor, step: Step, *, apart: bool = False, detached: bool = False) -> int:
        """``x`` is a step away from ``base``; ``apart``: with a past of its own from here on."""
        origin = self._find(base)
        node = step.take(self.to, self.value(base))
        if apart:
            self.add(x, node)
        elif step.op is ops.tap:
            self.add(x, node, kin=origin.family.kin)
        else:
            version = origin.family.storage.version
            self.tensors[x] = _Alias(origin.family, (*origin.steps, step), node, version, geometry(x))
        self.tensors[x].detached = detached or origin.detached
        return node

    def use(self, x: Tensor) -> int:
        """The node that holds the present value of a tensor that is known, as autograd sees it.

        Only a tensor that was detached loses its past: what ops compute inside has none in autograd's eyes either.
        """
        node = self.value(x)
        # x.detach().requires_grad_() is a start of its own; a view made without grad has a past if its base has one.
        own = x.requires_grad and (x._is_view() or not x.is_leaf)
        return self.to.detach(node) if self.tensors[x].detached and not own else node

    def value(self, x: Tensor) -> int:
        """The node that holds the present value of a tensor that is known, past and all."""
        alias = self._find(x)
        if alias.seen != alias.family.storage.version:
            node = self._root(alias.family)
            for step in alias.steps:
                node = step.take(self.to, node)
            alias.node, alias.seen = node, alias.family.storage.version
        return alias.node

    def reshaped(self, x: Tensor, step: Step) -> None:
        """``x`` itself took a step (``x.squeeze_()``)."""
        alias: _Alias = self.tensors[x]
        node = step.take(self.to, alias.node)
        self.tensors[x] = _Alias(alias.family, (*alias.steps, step), node, alias.seen, geometry(x))

    def write(self, x: Tensor, value: int, *, seen_by_autograd: bool) -> None:
        """``x`` now has the value of a node, which has its shape."""
        alias = self._find(x)
        family, storage = alias.family, alias.family.storage
        parents = [self._root(family)]
        for step in alias.steps[:-1]:
            parents.append(step.take(self.to, parents[-1]))
        root = value
        for step, parent in zip(reversed(alias.steps), reversed(parents[: len(alias.steps)]), strict=True):
            root = step.put(self.to, parent, root)
        whole = seen_by_autograd or not self.to.has_past(family.node)
        family.node = root if whole else self._assigned(family, root)
        storage.version += 1
        storage.writer, family.seen = family, storage.version
        alias.node, alias.seen = (value, storage.version) if whole else (alias.node, -1)

    def replace(self, x: Tensor, node: int) -> None:
        """``x`` was given other memory or another shape, with the value of a node."""
        storage = self.storage(x, foreign=False)
        storage.version += 1
        self.add(x, node)
        storage.writer = self.tensors[x].family

    def _find(self, x: Tensor) -> _Alias:
        """What is known of ``x``; where its memory was exchanged (``.data =``), its past with the new value."""
        alias: _Alias | None = self.tensors.get(x)
        where = x.untyped_storage()._cdata
        if alias is not None and alias.geometry == geometry(x) and alias.family.storage.ref.cdata == where:
            return alias
        old = None if alias is None else alias.node
        storage = self.storages.get(where)
        value = None if storage is None or storage.writer is None else self._by_place(storage.writer, x)
        if value is None:
            value = self.to.constant(x, "")
        self.add(x, value, foreign=storage is None)
        if old is not None and self.to.has_past(old):
            family = self.tensors[x].family
            past = _Family(family.storage, old, family.geometry, family.dtype, family.seen, family.kin)
            family.node = self.tensors[x].node = self._assigned(past, value)
        return self.tensors[x]

    def _by_place(self, family: _Family, x: Tensor) -> int | None:
        step = by_place(family.geometry, x, x.dtype) if family.dtype == x.dtype else None
        return None if step is None else step.take(self.to, self._root(family))

    def _root(self, family: _Family) -> int:
        """The root's node, after what other families wrote."""
        storage = family.storage
        if family.seen != storage.version:
            writer = storage.writer
            assert writer is not None
            step = by_place(writer.geometry, family.geometry, family.dtype) if writer.dtype == family.dtype else None
            if step is not None:
                value = step.take(self.to, writer.node)
                if writer.kin is family.kin:
                    family.node = value
                else:
                    family.node = (
                        self._assigned(family, value) if self.to.has_past(family.node) else self.to.detach(value)
                    )
            family.seen = storage.version
        return family.node

    def _assigned(self, family: _Family, value: int) -> int:
        """The past of a family's root with another value."""
        like, past = Like(family.geometry[0], family.dtype), family.node
        if self.to.dtype(past) != family.dtype:
            cast = {"dtype": family.dtype}
            past = self.to.emit(aten._to_copy.default, (At(past),), like, kwargs=cast)
        return self.to.emit(ops.assigned, (At(past), At(self.to.detach(value))), like)
