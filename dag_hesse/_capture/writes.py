"""Ops that write or draw, as ops that do not write; views as steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dag_hesse._capture.views import Like, Step, by_place
from dag_hesse.rules.lowering import LOWERINGS

aten = torch.ops.aten


@dataclass(frozen=True)
class Written:
    """A tensor from before the run, and what its storage held."""

    tensor: Tensor
    content: torch.UntypedStorage
    version: int

    @classmethod
    def of(cls, x: Tensor) -> Written:
        """As ``x`` is now."""
        return cls(x, x.untyped_storage().clone(), x._version)

    def restore(self) -> None:
        """Give the tensor back as it was, its version counter too."""
        storage = self.tensor.untyped_storage()
        if storage.nbytes() != self.content.nbytes():
            storage.resize_(self.content.nbytes())
        storage.copy_(self.content)
        torch._C._autograd._unsafe_set_version_counter((self.tensor,), (self.version,))


@dataclass(frozen=True)
class Pure:
    """A writing op on copies of what it writes to; called, it returns those, or the op's own ``results``."""

    op: Any
    positions: tuple[int, ...]
    results: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        for k in self.positions:
            given[k] = given[k].clone()
        found = self.op(*given, **kwargs)
        if self.results:
            return found
        copies = tuple(given[k] for k in self.positions)
        return copies if len(copies) > 1 else copies[0]

    def __str__(self) -> str:
        return str(self.op)


@dataclass(frozen=True)
class Functional:
    """An op without side effects: which of its outputs has the new value of which written argument."""

    op: Any
    outs: tuple[str, ...]  # arguments that only say where to write
    single: bool

    def arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Arguments of the op, from those of the writing one."""
        return args, {key: value for key, value in kwargs.items() if key not in self.outs}


def drawn(op: Any) -> bool:
    """Whether the op draws random numbers."""
    if isinstance(op, Pure):
        op = op.op
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


# Draws that autograd has the derivative zero of, whatever they are drawn by.
_FLAT = re.compile(
    r"aten\.(bernoulli|binomial|cauchy|exponential|geometric|log_normal|multinomial|normal|poisson|rand\w*|uniform)_?\."
)


@lru_cache(maxsize=1024)
def drawn_with_slope(op: Any) -> bool:
    """Whether what the op draws has a derivative by its arguments: a Gamma's, by implicit reparametrization."""
    if not drawn(op) or _FLAT.match(str(op)) or not isinstance(op, torch._ops.OpOverload):
        return False
    keys = ("Autograd", "AutogradCPU", "AutogradCUDA")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for key in keys)


@lru_cache(maxsize=1024)
def functional(op: Any) -> Functional:
    """The op that computes what ``op`` writes."""
    arguments = op._schema.arguments
    written = [k for k, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    outs = tuple(arguments[k].name for k in written if arguments[k].kwarg_only)
    single = len(written) == 1 and str(arguments[written[0]].type) == "Tensor"
    if op in LOWERINGS:
        return Functional(op, (), single)
    wanted = [(a.name, str(a.type)) for k, a in enumerate(arguments) if not (outs and k in written)]
    if not drawn(op):
        namespace, name = op._schema.name.split("::")
        packet = getattr(getattr(torch.ops, namespace), name if outs else name.removesuffix("_"), None)
        for overload in [] if packet is None else packet.overloads():
            other = getattr(packet, overload)
            same = [(a.name, str(a.type)) for a in other._schema.arguments] == wanted
            if same and not other._schema.is_mutable and len(other._schema.returns) == len(written):
                return Functional(other, outs, single)
    return Functional(Pure(op, tuple(written)), outs, single)


# --- running statistics ---------------------------------------------------------------------------------------------

_STATISTICS = {  # ops of batch normalization: positions of the two statistics, of training and of momentum
    "aten.native_batch_norm.default": (3, 4, 5, 6),
    "aten.cudnn_batch_norm.default": (3, 4, 5, 6),
    "aten.miopen_batch_norm.default": (3, 4, 5, 6),
    "aten._native_batch_norm_legit.default": (3, 4, 5, 6),
    "aten._batch_norm_with_update.default": (3, 4, None, 5),
}


def statistics(op: Any, args: Sequence[Any]) -> tuple[Tensor, Tensor, float] | None:
    """Running mean, running variance and momentum, where the op updates them."""
    places = _STATISTICS.get(str(op))
    if places is None or not isinstance(args[places[0]], Tensor):
        return None
    if places[2] is not None and not args[places[2]]:
        return None
    return args[places[0]], args[places[1]], args[places[3]]


# --- views ----------------------------------------------------------------------------------------------------------

_SPLITS = {
    "aten.split.Tensor",
    "aten.unsafe_split.Tensor",
    "aten.split_with_sizes.default",
    "aten.unsafe_split_with_sizes.default",
}
_BY_PLACE = {"aten.as_strided.default", "aten.set_.source_Tensor"}


def _slice(x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> tuple[int, ...]:
    """Arguments of a slice within the tensor's bounds."""
    return (dim, *slice(start, end).indices(x.shape[dim])[:2], step)


def view_step(op: Any, args: Sequence[Any], kwargs: dict[str, Any], base: Tensor, x: Tensor, number: int) -> Step:
    """How ``x``, an output of ``op``, is seen in ``base``."""
    name, here, there = str(op), Like(tuple(base.shape), base.dtype), Like(tuple(x.shape), x.dtype)
    if name == "aten.detach.default":  # where it is the user's, autograd sees no past in the result
        return Step(aten.alias.default, (), here, there)
    if name in _SPLITS:
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        sizes = args[1]
        start = number * sizes if isinstance(sizes, int) else sum(sizes[:number])
        return Step(aten.slice.Tensor, (dim, start, start + x.shape[dim], 1), here, there)
    if name == "aten.unbind.int":
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return Step(aten.select.int, (dim, number), here, there)
    if name == "aten.slice.Tensor":
        return Step(op, _slice(base, *args[1:]), here, there)
    usual = args and args[0] is base and name not in _BY_PLACE and not kwargs
    found = None if usual else by_place(base, x, x.dtype)
    return found or Step(op, tuple(args[1:]), here, there)
