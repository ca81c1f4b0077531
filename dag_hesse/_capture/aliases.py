"""Which node holds a tensor's value: storages, the tensors that share them, and writes through views.

A storage has one value; the tensors on it may have different pasts (``x.detach()`` shares x's memory, not its history).
Tensors of one storage and one past are a *family*: a root, and views that are steps away from it. A write into a view
makes a new root; whoever is used later takes the steps again. Writes that autograd does not see (under ``no_grad``,
through ``.data``) change a value and keep its past: node ``dag_hesse.assigned``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from dag_hesse._capture.views import At, Emitter, Geometry, Like, Step, by_place, geometry
from dag_hesse.ir import ops

aten = torch.ops.aten


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
