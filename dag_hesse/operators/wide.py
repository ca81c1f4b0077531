"""float64=True: the same model, batches and loss in double precision, from copies that follow the model's values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dag_hesse._capture import Batch
from dag_hesse._capture.advice import fitted
from dag_hesse._capture.batch import is_one, one_batch
from dag_hesse.errors import OptionError
from dag_hesse.gathered import is_sharded, local
from dag_hesse.ir import CurvatureGraph
from dag_hesse.sweep.settings import settings
from dag_hesse.sweep.watch import Watch


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def widened(module: nn.Module) -> nn.Module:
    """A copy in double precision.

    Raises:
        OptionError: the module cannot be copied.
    """
    try:
        return copy.deepcopy(module).double()
    except Exception as error:
        raise OptionError(
            f"float64=True copies the model, and {type(module).__name__} cannot be copied ({error}): give "
            "model.double() and a batch of float64 instead."
        ) from error


def widened_loss(loss: Any) -> Any:
    """A loss whose own tensors (class weights, say) are of double precision."""
    if isinstance(loss, nn.Module):
        return widened(loss)
    if hasattr(loss, "widened"):
        return loss.widened()
    if isinstance(loss, functools.partial):
        args, keywords = pytree.tree_map(_double, (loss.args, loss.keywords))
        return functools.partial(widened_loss(loss.func), *args, **keywords)
    return loss


class _Wide:
    """Batches of a loader, in double precision."""

    def __init__(self, batches: Iterable[Any], model: nn.Module, loss: Any) -> None:
        self.batches, self.fit = batches, (model, loss)

    def __iter__(self) -> Iterator[Batch]:
        return (_wide(item, *self.fit) for item in self.batches)


def _wide(batch: Any, model: nn.Module, loss: Any) -> Batch:
    own = fitted(one_batch(batch), model, loss)
    args, kwargs, targets = pytree.tree_map(_double, own.tree)
    return replace(own, args=args, kwargs=kwargs, targets=targets)


def widened_batches(batches: Any, model: nn.Module, loss: Any = None) -> Any:
    """A batch, a list of batches or a loader, in double precision and in the same form."""
    if is_one(batches) or not isinstance(batches, Iterable):
        return _wide(batches, model, loss)
    if isinstance(batches, list):
        return [_wide(item, model, loss) for item in batches]
    return iter(_Wide(batches, model, loss)) if isinstance(batches, Iterator) else _Wide(batches, model, loss)


class Origin(Watch):
    """Watches the model, and the held batches, that a copy in double precision was made of."""

    def __init__(self, model: nn.Module, batches: Any, graphs: Iterable[CurvatureGraph], loss: Any) -> None:
        held = batches if is_one(batches) or isinstance(batches, list) else []
        super().__init__(model, graphs, _Held(held), loss)  # type: ignore[arg-type]

    def settings(self) -> list[Any]:
        return settings(self.model, self.loss, None)  # which tensors the copy was made of is not known

    def _others(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}  # the copy's own


class Shards(Origin):
    """Watches a model, and held batches, whose parameters lie in parts on several ranks: each rank its own parts."""

    def __init__(self, *given: Any) -> None:
        self._seen: dict[str, tuple[Tensor, int, Tensor]] = {}
        super().__init__(*given)

    def _present(self) -> dict[str, Tensor]:
        is_sharded(self.model)
        return {name: self._part(name, x) for name, x in super()._present().items()}

    def _part(self, name: str, x: Tensor) -> Tensor:
        """The same view of a part, as long as it is the same part."""
        seen = self._seen.get(name)
        if seen is None or seen[0] is not x or seen[1] != x._version:
            self._seen[name] = seen = x, x._version, local(x)
        return seen[2]


class _Held:
    """The tensors of batches that a user holds."""

    def __init__(self, batches: Any) -> None:
        every = [batches] if is_one(batches) else batches
        self.tensors = [x for batch in every for x in one_batch(batch).tensors]


def follow(copied: nn.Module, model: nn.Module) -> None:
    """Give a copy the present values of its model; what has them already is left alone."""
    with torch.no_grad():
        pairs = zip([*copied.parameters(), *copied.buffers()], [*model.parameters(), *model.buffers()], strict=True)
        for mine, theirs in pairs:
            if not torch.equal(mine, theirs.to(mine)):
                mine.copy_(theirs)
