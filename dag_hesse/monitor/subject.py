"""What is watched: the bare model, the parameters that move, and the curvature at them of the loss on a fixed batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dag_hesse._capture.batch import check_finite
from dag_hesse._mapper import Mapper
from dag_hesse.errors import OptionError, PointError, RankError, kind_of
from dag_hesse.operators import HessianOperator
from dag_hesse.randomness import preserved
from dag_hesse.ranks import Ranks


def bare(model: Any) -> nn.Module:
    """The module inside of what ``torch.compile`` and data parallelism have wrapped.

    Raises:
        OptionError: it is no module, or its parameters are spread over processes.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is {kind_of(model)}; expected a torch.nn.Module.")
    for name, p in model.named_parameters():
        if hasattr(p, "placements") or "_flat_param" in name:
            raise OptionError(
                f"parameter '{name}' is a shard of one that lies in several processes (FSDP, tensor parallelism): a "
                "monitor needs whole ones. Analyze a checkpoint instead."
            )
    return model


def moving(model: nn.Module, optimizer: Any) -> dict[str, nn.Parameter]:
    """The parameters that training changes: those of the optimizer, or all, as far as they require gradients.

    Raises:
        PointError: there are none.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = {name: p for name, p in named.items() if id(p) in held}
    if not named:
        where = "" if optimizer is None else " that the optimizer holds: make it of this model's parameters"
        raise PointError(f"{type(model).__name__} has no parameter that requires gradients{where}.")
    return named


def beside(model: nn.Module, batch: Any) -> Any:
    """The batch on the device that the model lies on; what has no device stays as it is."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return pytree.tree_map(lambda x: x.to(device) if hasattr(x, "to") else x, batch)


@contextmanager
def _in_full_precision() -> Iterator[None]:
    """Nothing goes through ``torch.autocast``, be it entered outside, inside of a forward, or around it by accelerate.

    Under it, forwards are bfloat16's or float16's while parameters and updates are float32's.
    """
    kinds = [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)]
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        nothing = mock.patch.multiple(torch.autocast, __enter__=lambda self: self, __exit__=lambda self, *error: None)
        stack.enter_context(nothing)
        yield


class Subject:
    """A model and a batch; captured at first use, and anew where parameters come, go, or change their shape.

    Args:
        model, optimizer: as they are; the optimizer may be None.
        batch: fixed.
        training: whether the model is measured in the mode that it is in, or in evaluation mode.
        options: ``loss``, ``output``, ``memory`` and ``mesh``.
        mapped: options of the map.
        ranks: that measure together, if there are several.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        optimizer: Any,
        *,
        training: bool,
        options: Mapping[str, Any],
        mapped: Mapping[str, Any],
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        self._own_buffers: dict[str, Tensor] = {}
        self.model, self.batch, self.optimizer, self.training = model, batch, optimizer, training
        self._options, self._mapped = options, mapped
        self._operator: HessianOperator | None = None
        self._mapper: Mapper | None = None
        self._signature: Any = None
        self._stale = set[str]()
        self.parameters = moving(model, optimizer)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Everything that a measurement must not depend on, or change, set aside."""
        flags = [(module, module.training) for module in self.model.modules()]
        with ExitStack() as stack:
            for context in (torch.inference_mode(False), torch.enable_grad(), preserved(), _in_full_precision()):
                stack.enter_context(context)
            try:
                if not self.training:  # flags alone: a module's own eval() may do more, and that twice
                    for module, _ in flags:
                        module.training = False
                yield
            finally:
                for module, flag in flags:
                    module.training = flag
                self._give_back()
                self.release()

    def meet(self, step: int) -> None:
        """Begin a measurement on all ranks, with the buffers of the first; each gets its own back in the end.

        Raises:
            RankError: another rank is at another step.
        """
        if self.ranks is None:
            return
        steps = self.ranks.told("a measurement", step)
        if len(set(steps)) > 1:
            raise RankError(f"ranks measure at steps {steps}: expected step() with the same numbers on all.")
        self.ranks.adopt_buffers(self.model, self._own_buffers)

    def _give_back(self) -> None:
        buffers = dict(self.model.named_buffers())
        with torch.no_grad():
            for name, x in self._own_buffers.items():
                buffers[name].copy_(x)
        self._own_buffers = {}

    def wait(self) -> None:
        """Let training's kernels end that a device has yet to run: their time is not the measurement's."""
        for device in {p.device for p in self.model.parameters() if p.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def look(self) -> None:
        """See what the parameters are now; what was captured holds as long as they have the same names and shapes.

        Raises:
            NonFiniteError: a parameter or a buffer is not finite.
            PointError: none is left that moves.
        """
        self.parameters = moving(self.model, self.optimizer)
        named = dict(self.model.named_parameters())
        check_finite(named, [p.detach() for p in named.values()], "parameter")
        buffers = dict(self.model.named_buffers())
        check_finite(buffers, buffers.values(), "buffer")
        signature = list(self.parameters), [(n, p.shape, p.dtype, p.device) for n, p in named.items()]
        if signature != self._signature:
            self._operator = self._mapper = None
            self._signature = signature
        self._stale = {"operator", "mapper"}

    @property
    def operator(self) -> HessianOperator:
        """The Hessian by the parameters that move."""
        if self._operator is None:
            self._operator = HessianOperator(self.model, self.batch, params=list(self.parameters), **self._options)
        elif "operator" in self._stale:
            self._operator.refresh()
        self._stale.discard("operator")
        return self._operator

    @property
    def mapper(self) -> Mapper:
        """What maps are made by."""
        if self._mapper is None:
            self._mapper = Mapper(self.model, self.batch, **self._options, **self._mapped)
        elif "mapper" in self._stale:
            self._mapper.refresh()
        self._stale.discard("mapper")
        return self._mapper

    def release(self) -> None:
        """Give back the memory of linearizations."""
        if self._operator is not None:
            self._operator.release()
        if self._mapper is not None:
            self._mapper.release()

    def forget(self) -> None:
        """Capture anew next time."""
        self._operator = self._mapper = None

    def copy(self) -> dict[str, Tensor]:
        """The parameters that move, as they are now."""
        return {name: p.detach().clone() for name, p in moving(self.model, self.optimizer).items()}

    def update(self, before: Mapping[str, Tensor]) -> list[Tensor] | None:
        """Per parameter, by how much it has moved; None where they are other ones now."""
        now = self.parameters
        same = list(now) == list(before) and all(now[n].shape == before[n].shape for n in now)
        return [p.detach() - before[name].to(p) for name, p in now.items()] if same else None
