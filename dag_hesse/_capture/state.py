"""What a forward may change besides its result, noted before a run and given back after it."""

from __future__ import annotations

import functools
import random
import types
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dag_hesse._capture.writes import Written
from dag_hesse.randomness import preserved

_MOST = 200_000  # objects looked at
_FOREIGN = ("torch", "numpy", "scipy", "builtins", "_thread", "threading", "logging", "weakref", "dag_hesse", "typing")
_PLAIN = (str, bytes, int, float, bool, complex, type(None), type, types.ModuleType)
_UNSET = object()
Undo = Callable[[], None]


def _content(x: dict[Any, Any]) -> dict[Any, Any]:
    """What a mapping holds, whatever its class makes of look-ups."""
    return dict(x) if type(x) is dict else {key: dict.__getitem__(x, key) for key in _plain(x).keys(x)}


def _plain(x: dict[Any, Any]) -> type[dict[Any, Any]]:
    return OrderedDict if isinstance(x, OrderedDict) else dict


def _restore_mapping(into: dict[Any, Any], saved: dict[Any, Any]) -> None:
    now = _content(into)
    if len(now) != len(saved) or not (all(map(is_, now, saved)) and all(map(is_, now.values(), saved.values()))):
        _plain(into).clear(into)
        for key, value in saved.items():
            _plain(into).__setitem__(into, key, value)


def _restore_list(into: list[Any], saved: list[Any]) -> None:
    if list.__len__(into) != len(saved) or any(a is not b for a, b in zip(list.__iter__(into), saved, strict=True)):
        list.__setitem__(into, slice(None), saved)


def _restore_others(into: Any, saved: list[Any]) -> None:
    """Sets and deques."""
    if len(into) != len(saved) or not all(map(is_, into, saved)):
        into.clear()
        for item in saved:
            (into.append if isinstance(into, deque) else into.add)(item)


def _restore_tensor(x: Tensor, data: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    moved = (x.shape, x.dtype, x.device) != (data.shape, data.dtype, data.device) or x.data_ptr() != data.data_ptr()
    if moved or x.stride() != data.stride():
        version = x._version
        x.data = data
        torch._C._autograd._unsafe_set_version_counter((x,), (version,))
    if x.is_leaf and x.requires_grad != requires_grad:
        x.requires_grad_(requires_grad)
    if x.is_leaf and x.grad is not grad:
        x.grad = grad


class Snapshot:
    """Contents of all containers, attributes, closures and referenced globals that a model's forward can reach.

    Tensors are noted by the memory they lie in; what is written into that memory is noted when it is written
    (:class:`~dag_hesse._capture.writes.Written`).
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.undo: list[Undo] = []
        self.written: list[Written] = []
        self._generators: dict[int, torch.Generator] = {}
        self._seen: dict[int, Any] = {}
        self._queue: deque[Any] = deque(roots)
        while self._queue and len(self._seen) < _MOST:
            item = self._queue.popleft()
            if id(item) not in self._seen:
                self._seen[id(item)] = item  # kept, so that no other takes its id
                self._note(item)

    def knows(self, x: Any) -> bool:
        """Whether an object was there before the run."""
        return id(x) in self._seen

    def keep_generator(self, generator: torch.Generator) -> None:
        """Note the state of one's own random generator, before it is first used."""
        if id(generator) not in self._generators:
            self._generators[id(generator)] = generator
            self.undo.append(functools.partial(_restore_generator, generator, generator.get_state()))

    def restore(self) -> None:
        """Give everything back."""
        for undo in self.undo:
            undo()
        for item in reversed(self.written):
            item.restore()

    def _more(self, items: Iterable[Any]) -> None:
        self._queue.extend(x for x in items if not isinstance(x, _PLAIN))

    def _note(self, x: Any) -> None:
        if isinstance(x, (dict, list, tuple, set, deque)):
            self._container(x)
        elif isinstance(x, Tensor):
            if type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and x.is_leaf:
                self.undo.append(functools.partial(_restore_tensor, x, x.detach(), x.grad, x.requires_grad))
        elif isinstance(x, _PLAIN):
            return
        elif isinstance(x, functools._lru_cache_wrapper):
            if x.cache_info().currsize == 0:
                self.undo.append(x.cache_clear)
            self._queue.append(x.__wrapped__)
        elif isinstance(x, torch.Generator):
            self.keep_generator(x)
        elif type(x) in _STATES:
            read, write = _STATES[type(x)]
            self.undo.append(functools.partial(write, x, read(x)))
        elif isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, types.BuiltinFunctionType):
            self._more([x.__self__])
        elif isinstance(x, types.MethodType):
            self._queue.extend((x.__self__, x.__func__))
        elif isinstance(x, functools.partial):
            self._queue.extend((x.func, x.args, x.keywords))
        else:
            self._object(x)

    def _container(self, x: Any) -> None:
        """What it holds, and what it has besides."""
        if isinstance(x, dict):
            saved = _content(x)
            self.undo.append(functools.partial(_restore_mapping, x, saved))
            self._more(saved.values())
        elif isinstance(x, list):
            self.undo.append(functools.partial(_restore_list, x, list(list.__iter__(x))))
            self._more(list.__iter__(x))
        elif isinstance(x, tuple):
            self._more(x)
        else:
            self.undo.append(functools.partial(_restore_others, x, list(x)))
            self._more(x)
        if isinstance(x, defaultdict):
            self.undo.append(functools.partial(_restore_slot, x, "default_factory", x.default_factory))
            self._queue.append(x.default_factory)
        if type(x) is OrderedDict and not vars(x):  # a module has a dozen of these
            self.undo.append(vars(x).clear)
        elif type(x) not in (dict, list, tuple, set, deque):
            self._object(x)

    def _object(self, x: Any) -> None:
        kind = type(x)
        for name in _slots(kind):
            value = getattr(x, name, _UNSET)
            self.undo.append(functools.partial(_restore_slot, x, name, value))
            self._queue.append(value)
        is_module = isinstance(x, nn.Module)
        if (not is_module and kind.__module__.split(".")[0] in _FOREIGN) or not isinstance(
            getattr(x, "__dict__", None), dict
        ):
            return
        self._queue.append(vars(x))
        for base in kind.__mro__:
            if base.__module__.split(".")[0] not in _FOREIGN and id(base) not in self._seen:
                self._seen[id(base)] = base
                self._queue.extend(f for f in vars(base).values() if _runs(f))
                self._class_values(base)

    def _class_values(self, base: type) -> None:
        """Counters and caches that a class holds for all of its objects."""
        self.undo.append(functools.partial(_forget_new, base, set(vars(base))))
        for name, value in list(vars(base).items()):
            if name.startswith("__") or _runs(value) or isinstance(value, (property, staticmethod, classmethod)):
                continue
            if isinstance(value, (int, float, Tensor, type(None))):
                self.undo.append(functools.partial(_restore_attribute, base, name, value))
            elif isinstance(value, (dict, list, set, deque, *_STATES)):
                self._queue.append(value)

    def _function(self, f: types.FunctionType) -> None:
        if (f.__module__ or "").split(".")[0] in _FOREIGN:
            return
        if f.__dict__:
            self._queue.append(f.__dict__)
        for cell in f.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            self.undo.append(functools.partial(_restore_cell, cell, value))
            self._queue.append(value)
        for name in global_names(f.__code__):
            if name in f.__globals__:
                value = f.__globals__[name]
                if isinstance(value, (int, float, str, bool, type(None))):
                    self.undo.append(functools.partial(_restore_global, f.__globals__, name, value))
                elif _runs(value) or isinstance(value, (dict, list, set, deque, Tensor, *_STATES)):
                    self.undo.append(functools.partial(_restore_global, f.__globals__, name, value))
                    self._queue.append(value)


def _slots(kind: type) -> Iterator[str]:
    """Names of the slots of a class of the user's."""
    for base in kind.__mro__ if kind.__module__.split(".")[0] not in _FOREIGN else ():
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if not name.startswith("__"):
                yield name
            elif not name.endswith("__"):
                yield f"_{base.__name__.lstrip('_')}{name}"


def _runs(x: Any) -> bool:
    return isinstance(x, (types.FunctionType, functools._lru_cache_wrapper))


def global_names(code: types.CodeType) -> set[str]:
    """Global names of a function and of those defined in it."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(global_names(c) for c in inner))


def _restore_slot(x: Any, name: str, value: Any) -> None:
    if getattr(x, name, _UNSET) is value:
        return
    if value is _UNSET:
        delattr(x, name)
    else:
        setattr(x, name, value)


def _forget_new(owner: type, names: set[str]) -> None:
    for name in set(vars(owner)) - names:
        delattr(owner, name)


def _write_elements(x: Any, saved: Any) -> None:
    x[:] = saved


def _write_array(x: np.ndarray, saved: np.ndarray) -> None:
    if x.flags.writeable and x.shape == saved.shape:
        np.copyto(x, saved)


# What has a state of its own that can be read and written.
_STATES: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    np.ndarray: (np.copy, _write_array),
    np.random.Generator: (
        lambda x: x.bit_generator.state,
        lambda x, state: setattr(x.bit_generator, "state", state),
    ),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    bytearray: (bytes, _write_elements),
    array: (lambda x: x[:], _write_elements),
}


def _restore_generator(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _restore_cell(cell: types.CellType, value: Any) -> None:
    cell.cell_contents = value


def _restore_global(names: dict[str, Any], name: str, value: Any) -> None:
    if names.get(name) is not value:
        names[name] = value


def _restore_attribute(owner: type, name: str, value: Any) -> None:
    if vars(owner).get(name) is not value:
        setattr(owner, name, value)


@contextmanager
def restored(*roots: Any) -> Iterator[Snapshot]:
    """Give back what is reachable from ``roots``, the random states, and the memory of tensors that are listed.

    Yields the snapshot; what is put into its ``written`` while the context is open is written back at its end.
    Autocast's cache of weights is neither read nor filled.
    """
    snapshot, cached = Snapshot(roots), torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    with preserved():
        try:
            yield snapshot
        finally:
            torch.set_autocast_cache_enabled(cached)
            with torch.no_grad():
                snapshot.restore()
