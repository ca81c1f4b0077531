"""A model whose parameters lie in pieces on several ranks (``fully_shard``), as a copy that has them whole.

The copy has the model's modules, hooks and attributes, without what sharding added to them, so that a forward of it
computes what one of the model does, and sends nothing. The model itself stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dag_hesse.budget import Budget
from dag_hesse.errors import OptionError, kind_of
from dag_hesse.ranks import Ranks

_OF_FSDP = "torch.distributed.fsdp"
_MARKS = ("__composable_api", "_is_fsdp", "_fsdp")  # attributes that sharding leaves on modules


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank has a part of some tensor.

    A forward that no backward followed has left layers gathered; they are let go first.
    """
    for module in model.modules():
        if _is_fsdp(type(module)):
            getattr(module, "reshard")()  # noqa: B009  (of a class that not every PyTorch has)
    return any(_is_part(x) for _, x in _named(model))


def gathered(model: nn.Module, ranks: Ranks, budget: Budget) -> nn.Module:
    """A copy with whole parameters and buffers; those that are whole already are the model's own. Made on all ranks.

    Raises:
        MemoryBudgetError: they do not fit.
        OptionError: the model is parallel in other ways, lies on ranks beyond the mesh, or cannot be copied.
    """
    with ranks.together("gathering parameters"):
        _check(model, ranks, budget)
    memo: dict[int, Any] = {id(x): _whole(x) for _, x in _named(model)}
    with ranks.together("copying the model"):
        shells: dict[int, Any] = {id(module): object.__new__(_plain(type(module))) for module in model.modules()}
        memo |= shells  # so that whatever refers to a module refers to its copy
        for module in model.modules():
            try:
                vars(shells[id(module)]).update(copy.deepcopy(_unmarked(module), memo))
            except Exception as error:
                raise OptionError(
                    f"parameters in pieces are gathered into a copy of the model, and {kind_of(module)} of it "
                    f"cannot be copied ({error}): give a model with whole parameters, with .full_tensor() of each, say."
                ) from error
    found: nn.Module = shells[id(model)]
    return found


def regather(whole: nn.Module, model: nn.Module) -> None:
    """Give a copy that :func:`gathered` made the model's present values. Called on all ranks."""
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(_named(whole), _named(model), strict=True):
            if mine is not theirs:
                mine.copy_(_full(theirs))


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor, in the tensor's own memory."""
    with torch.no_grad():
        found: Tensor = x.to_local() if _is_part(x) else x  # type: ignore[attr-defined]
        return found


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_part(x: Tensor) -> bool:
    return hasattr(x, "placements")


def _full(x: Any) -> Tensor:
    found: Tensor = x.detach().full_tensor() if _is_part(x) else x.detach()
    return found


def _whole(x: Tensor) -> Tensor:
    if not _is_part(x):
        return x
    full = _full(x).clone()  # of a replica it would be the model's own memory
    return nn.Parameter(full, x.requires_grad) if isinstance(x, nn.Parameter) else full


def _is_fsdp(kind: type) -> bool:
    return dist.is_available() and any(base.__name__ == "FSDPModule" for base in kind.__bases__)


def _plain(kind: type) -> type:
    """What a class was before ``fully_shard`` put its own in front."""
    return next(base for base in kind.__bases__ if base.__name__ != "FSDPModule") if _is_fsdp(kind) else kind


def _unmarked(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, without sharding's."""
    own = {name: value for name, value in vars(module).items() if not name.startswith(_MARKS)}
    for name, hooks in own.items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            kept = {key: hook for key, hook in hooks.items() if not _made_by(hook).startswith(_OF_FSDP)}
            own[name] = type(hooks)(kept)
    return own


def _made_by(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""


def _check(model: nn.Module, ranks: Ranks, budget: Budget) -> None:
    parts = [(name, x) for name, x in _named(model) if _is_part(x)]
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if _made_by(hook).startswith("torch.distributed") and not _made_by(hook).startswith(_OF_FSDP):
                raise OptionError(
                    f"'{name}' computes in parallel with other ranks ({_made_by(hook)}): give the model as it was "
                    "before parallelize_module, or one that is sharded by fully_shard alone."
                )
    for name, x in parts:
        others = set(x.device_mesh.mesh.flatten().tolist()) - ranks.members  # type: ignore[attr-defined]
        if others:
            raise OptionError(
                f"'{name}' has parts on the ranks {sorted(others)}, which are not of mesh=: expected a mesh of all."
            )
    need = sum(x.numel() * x.itemsize for _, x in parts)
    first = max(parts, key=lambda part: part[1].numel())[0]
    what = f"gathering {len(parts)} tensors that ranks have parts of, the largest '{first}',"
    budget.check(need, what, "give a smaller model")


__all__ = ["gathered", "is_sharded", "local", "regather"]
