"""What a forward and a loss may go by besides tensors, as a list that can be compared with a later one."""

from __future__ import annotations

import functools
import types
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dag_hesse._capture.state import global_names

_LONG = 64  # entries beyond which a container is a record, not a setting
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)
_STRUCTURE = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = {*vars(nn.Module()), "training"}  # attributes of every module: tensors, flags and hooks, which are watched apart
# Functions of libraries name each other by globals, thousands of them, and keep no settings there.
_INSTALLED = "site-packages"
# Packages whose objects hold settings; others' (a trainer, a logger) change all the time, and are none.
_CONFIGS = ("__main__", "addict", "argparse", "box", "collections", "easydict", "ml_collections", "omegaconf", "types")


def settings(model: nn.Module, loss: Any, used: set[int] | None) -> list[Any]:
    """Modules and their hooks, numbers, flags, functions, and objects that hold them, in an order that stays.

    Read are attributes, containers, closures, defaults, globals that functions name, and attributes of classes, of what
    the packages of the model and of the loss define. Parameters count by their form and by which of them are one,
    buffers and other tensors where they lie among the memory that is ``used``. None: others than buffers all count, by
    writes to them too.

    Examples:
        >>> model = nn.LeakyReLU(0.1)
        >>> before = settings(model, None, set())
        >>> model.negative_slope = 0.2
        >>> settings(model, None, set()) == before
        False
    """
    modules = [*model.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())]
    reader = _Reader({_package(type(m)) for m in modules} | {_package(loss), _package(type(loss))}, used)
    for module in modules:
        reader.module(module)
    reader.read([loss])
    return reader.found


def _package(x: Any) -> str:
    return str(getattr(x, "__module__", None) or "").split(".")[0]


class _Reader:
    def __init__(self, packages: set[str], used: set[int] | None) -> None:
        self.packages = {*packages, *_CONFIGS} - {"torch", "builtins", ""}
        self.used, self.found = used, list[Any]()
        self._seen: dict[int, Any] = {}
        self._order: dict[int, int] = {}  # of parameters, by identity

    def module(self, module: nn.Module) -> None:
        """One module without those inside it."""
        self._seen[id(module)] = module
        own = vars(module)
        self.found += (id(module), type(module))
        for name in _STRUCTURE:
            if held := own.get(name):
                self.found += (name, *held, *map(id, held.values()))
        parameters, buffers = own.get("_parameters") or {}, own.get("_buffers") or {}
        self.found += [(name, self._form(x)) for name, x in parameters.items()]
        self.found += [(name, x is None or self.used is None or self._place(x)) for name, x in buffers.items()]
        rest = [name for name in own if name not in _OWN]
        self.found += rest
        self.read([*map(own.get, rest), *self._of_class(type(module))])

    def _form(self, x: Tensor | None) -> Any:
        if x is None or is_lazy(x):
            return type(x)
        return self._order.setdefault(id(x), len(self._order)), x.shape, x.dtype, x.device, x.requires_grad

    def _place(self, x: Tensor) -> Any:
        if self.used is None:
            return x.data_ptr(), 0 if x.is_inference() else x._version
        return x.data_ptr() in self.used and x.data_ptr()

    def read(self, values: Iterable[Any]) -> None:
        """What is reachable from some values, breadth first."""
        waiting = deque(values)
        while waiting:
            x = waiting.popleft()
            if isinstance(x, _PLAIN):
                self.found.append(x if x == x else "NaN")  # which would differ from itself
            elif isinstance(x, Tensor):
                self.found.append(self._place(x))
            elif isinstance(x, (np.ndarray, bytearray, array)):
                self.found.append(zlib.crc32(np.ascontiguousarray(x).tobytes() if isinstance(x, np.ndarray) else x))
            elif id(x) not in self._seen:
                self._seen[id(x)] = x  # kept, so that no other takes its id
                waiting += self._inside(x)

    def _inside(self, x: Any) -> Iterator[Any]:
        if isinstance(x, (list, tuple, deque)):
            yield from x if len(x) <= _LONG else ()
        elif isinstance(x, (set, frozenset)):
            yield tuple(sorted(map(repr, x))) if len(x) <= _LONG else None
        elif isinstance(x, (dict, types.MappingProxyType)):
            yield from (part for key, value in x.items() for part in (str(key), value)) if len(x) <= _LONG else ()
        elif isinstance(x, functools.partial):
            yield from (x.func, x.args, x.keywords)
        elif isinstance(x, types.MethodType):
            yield from (x.__self__, x.__func__)
        elif isinstance(x, types.FunctionType):
            yield from self._of_function(x)
        elif isinstance(x, nn.Module):
            self.module(x)
        elif _package(type(x)) in self.packages:
            yield type(x)
            yield from _attributes(x)
            yield from self._of_class(type(x))
        elif callable(x):
            yield id(x)

    def _of_function(self, f: types.FunctionType) -> Iterator[Any]:
        yield id(f.__code__)
        if _package(f) not in self.packages:
            return
        yield from (f.__defaults__, f.__kwdefaults__, dict(vars(f)))
        named = () if _INSTALLED in f.__code__.co_filename else sorted(global_names(f.__code__))
        for cell in f.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                yield None
        for name in named:
            value = f.__globals__.get(name)
            if not isinstance(value, (types.ModuleType, type, Tensor)):
                yield value

    def _of_class(self, kind: type) -> Iterator[Any]:
        if id(kind) in self._seen:
            return
        self._seen[id(kind)] = kind
        for base in kind.__mro__:
            if _package(base) in self.packages:
                for name, value in list(vars(base).items()):
                    if not name.startswith("__") or name in ("__call__", "__init__"):
                        yield getattr(value, "fget", None) or getattr(value, "__func__", value)


def _attributes(x: Any) -> Iterator[Any]:
    for base in type(x).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(x, name, None)
    yield from (part for name, value in getattr(x, "__dict__", {}).items() for part in (name, value))
