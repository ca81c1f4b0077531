"""An op written as ops that have rules: its lowering is run on tensors without values, and what it calls is noted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dag_hesse._capture.trail import name_of
from dag_hesse._capture.views import Like
from dag_hesse._capture.writes import functional
from dag_hesse.errors import CaptureError
from dag_hesse.rules import RULES, lowering


@dataclass(frozen=True, slots=True)
class Given:
    """The ``number``-th tensor argument of the op that is written."""

    number: int


@dataclass(frozen=True, slots=True)
class Made:
    """What the ``number``-th op of a recipe gave."""

    number: int


@dataclass(frozen=True, slots=True)
class RecipeOp:
    """One op of a recipe: its arguments hold :class:`Given`, :class:`Made` and constant tensors."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like: Like
    output: int | None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Its ops in order, and per output of the op what holds it (None where it has none)."""

    ops: tuple[RecipeOp, ...]
    results: tuple[Given | Made | Tensor | None, ...]
    integers: tuple[int, ...] = ()  # numbers of the tensor arguments whose values it was written for


class _Noting(TorchDispatchMode):
    """Notes the ops that a lowering calls; those that have a lowering themselves are written out in turn."""

    def __init__(self, given: Sequence[Tensor], device: torch.device) -> None:
        super().__init__()
        self.places: dict[int, Given | Made] = {id(x): Given(k) for k, x in enumerate(given)}
        self.held: list[Any] = list(given)  # no id is used twice
        self.ops: list[RecipeOp] = []
        self.device = device

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = lowering.decompositions().get(op)
        if written is not None:
            with self:
                found = written(*args, **kwargs)
            if found is not NotImplemented:
                return found
        elif str(op) not in RULES and op._can_decompose():  # below autograd, composite ops come here whole
            with self:
                return op.decompose(*args, **kwargs)
        result = op(*args, **kwargs)
        where = pytree.tree_map(self._place, (tuple(args), dict(kwargs)))
        if op is torch.ops.aten.detach_.default:
            return result
        tensors = [result] if isinstance(result, Tensor) else list(result)
        pure = functional(op).op if op._schema.is_mutable else op
        for number, x in enumerate(tensors):
            if isinstance(x, Tensor):
                output = None if isinstance(result, Tensor) else number
                self.ops.append(RecipeOp(pure, where[0], where[1], Like(tuple(x.shape), x.dtype), output))
                self.places[id(x)] = Made(len(self.ops) - 1)
                self.held.append(x)
        if op._schema.is_mutable:  # the written argument is what the op gave
            self.places[id(args[0])] = Made(len(self.ops) - 1)
        return result

    def _place(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.places.get(id(arg), arg)
        if isinstance(arg, torch.device):
            return self.device
        return arg

    def result(self, x: Any) -> Given | Made | Tensor | None:
        """What holds an output of the lowering."""
        return self.places.get(id(x), x) if isinstance(x, Tensor) else None


_RECIPES: dict[Any, Recipe | None] = {}
_MOST = 4096


def recipe(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Recipe | None:
    """How ``op`` is written for arguments of these shapes, dtypes and options; None: it stays as it is."""
    concrete = getattr(lowering, "CONCRETE", {}).get(op)
    written = concrete or lowering.decompositions().get(op)
    if written is None:
        return None
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    key = None
    if concrete is None:
        key = (op, str(spec), tuple(_described(x) for x in leaves))
        if key in _RECIPES:
            return _RECIPES[key]
    found = _noted(op, written, leaves, spec, tensors, keep_integers=concrete is not None)
    if key is not None and len(_RECIPES) < _MOST:
        _RECIPES[key] = found
    return found


def _noted(
    op: Any, written: Callable[..., Any], leaves: list[Any], spec: Any, tensors: list[Tensor], keep_integers: bool
) -> Recipe | None:
    device = tensors[0].device if tensors else torch.device("cpu")
    empty = [_empty(x, keep_integers) for x in tensors]
    given = iter(empty)
    args, kwargs = pytree.tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)
    noting = _Noting(empty, device)
    with noting, torch.no_grad():
        try:
            found = written(*args, **kwargs)
        except Exception as error:
            raise CaptureError(f"the lowering of {name_of(op)} fails: {type(error).__name__}: {error}") from error
    if found is NotImplemented:
        return None
    results = (found,) if isinstance(found, Tensor) else tuple(found)
    integers = tuple(k for k, x in enumerate(tensors) if keep_integers and not _is_float(x))
    return Recipe(tuple(noting.ops), tuple(noting.result(x) for x in results), integers)


def _empty(x: Tensor, keep_integers: bool) -> Tensor:
    if keep_integers and not _is_float(x):
        return x.detach()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _described(x: Any) -> Any:
    if isinstance(x, Tensor):
        return tuple(x.shape), x.stride(), x.dtype, x.device
    return type(x), x if isinstance(x, (int, float, bool, str, type(None))) else repr(x)
