"""Arguments of an op: the tensors in them, what is written to, and what results depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tag, Tensor

from dag_hesse._capture.views import At

aten = torch.ops.aten


def flat(tree: Any) -> Iterator[Any]:
    """What lists and tuples hold, however deep."""
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from flat(item)
    else:
        yield tree


def shaped_by_values(op: Any, args: Any) -> bool:
    """Whether a result's size depends on values: Python may have looked at it."""
    if op is aten.index.Tensor:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return Tag.dynamic_output_shape in op.tags


def place_of(x: Tensor, among: Sequence[Tensor]) -> int | None:
    """Where a tensor itself is among others."""
    return next((k for k, other in enumerate(among) if other is x), None)


def promoted(x: Tensor, args: Any) -> torch.dtype:
    """The type that an op which writes to ``x`` computes in."""
    dtype = x.dtype
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_floating_point() and dtype.is_floating_point and arg.ndim:
            dtype = torch.promote_types(dtype, arg.dtype)
    return dtype


def placed(arg: Any, nodes: dict[int, int]) -> Any:
    """An argument with nodes, by the tensors' identities, in place of tensors."""
    if isinstance(arg, Tensor):
        return At(nodes[id(arg)])
    if isinstance(arg, (list, tuple)):
        return type(arg)(placed(item, nodes) for item in arg)
    return arg


def mutated_by(op: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that the op's schema says it writes to."""
    if not op._schema.is_mutable:
        return []
    found = []
    for k, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[k] if k < len(args) else kwargs.get(argument.name)
            found += [x for x in flat(value) if isinstance(x, Tensor)]
    return found


__all__ = ["flat", "mutated_by", "place_of", "placed", "promoted", "shaped_by_values"]
