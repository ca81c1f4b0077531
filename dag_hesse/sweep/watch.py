"""Whether what a linearization was made of is still what it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dag_hesse._capture import Batches
from dag_hesse.errors import StaleError
from dag_hesse.ir import CurvatureGraph
from dag_hesse.sweep.settings import settings

_SAMPLES = 64  # elements of a tensor that are looked at


class Watch:
    """Notes parameters, the buffers that a graph uses, and the batches that are held.

    Version counters miss what goes through ``.data``, so the memory that tensors lie in is noted too, and some of
    their elements.

    Examples:
        >>> import torch, dag_hesse
        >>> from torch import nn
        >>> model = nn.Linear(2, 1)
        >>> graph = dag_hesse.capture(model, (torch.ones(1, 2), torch.ones(1, 1)))
        >>> watch = Watch(model, [graph], Batches((torch.ones(1, 2), torch.ones(1, 1))))
        >>> _ = model.weight.data.mul_(2)
        >>> watch.changes()
        ["parameter 'weight'"]
    """

    def __init__(self, model: nn.Module, graphs: Iterable[CurvatureGraph], batches: Batches, loss: Any = None) -> None:
        self.model, self.batches, self.loss = model, batches, loss
        graphs = list({id(graph): graph for graph in graphs}.values())
        self._parameters = {name for graph in graphs for name in graph.parameters}
        self._constants = {graph.nodes[k].name: value for graph in graphs for k, value in graph.constants.items()}
        self._used = {x.data_ptr() for x in self._constants.values()}
        self._identities: dict[str, tuple[Any, ...]] = {}
        self._views: dict[str, Tensor] = {}
        self.note()

    def note(self) -> None:
        """Take everything as it is now for what it should be."""
        self._training = self.training_flags()
        self._settings = self.settings()
        self.note_values()

    def note_values(self) -> None:
        """Take tensors as they are now for what they should be."""
        now, old = self._present(), self._identities
        self._identities = {name: _identity(x) for name, x in now.items()}
        self._views = {
            name: self._views[name] if old.get(name, ())[:-1] == self._identities[name][:-1] else _some(x)
            for name, x in now.items()
        }
        alike: dict[Any, list[str]] = {}
        for name, view in self._views.items():
            alike.setdefault((view.dtype, view.device), []).append(name)
        self._groups = list(alike.values())
        self._values = [self._elements(names) for names in self._groups]

    def training_flags(self) -> list[bool]:
        """The training flags of all modules."""
        return [module.training for module in self.model.modules()]

    def changed_training_flags(self) -> bool:
        """Whether the training flag of a module is another one."""
        return self.training_flags() != self._training

    def settings(self) -> list[Any]:
        """What a forward may go by besides tensors (:func:`~dag_hesse.sweep.settings.settings`)."""
        return settings(self.model, self.loss, self._used)

    def alike(self) -> bool:
        """Whether training flags and settings are what they were; a forward that counts its own calls changes them."""
        return not self.changed_training_flags() and self.settings() == self._settings

    def changes(self) -> list[str]:
        """Names of what is not what it was."""
        now = self._present()
        found = [name for name, x in now.items() if self._identities.get(name) != _identity(x)]
        found += [name for name in self._identities if name not in now]
        for names, old in zip(self._groups, self._values, strict=True):
            new = self._elements(names)
            if not _equal(new, old):
                pieces = zip(names, new.split(self._sizes(names)), old.split(self._sizes(names)), strict=True)
                found += [name for name, a, b in pieces if name not in found and not _equal(a, b)]
        return found + (["the training flags"] if self.changed_training_flags() else [])

    def _elements(self, names: list[str]) -> Tensor:
        return torch.cat([self._views[name] for name in names])

    def _sizes(self, names: list[str]) -> list[int]:
        return [len(self._views[name]) for name in names]

    def _present(self) -> dict[str, Tensor]:
        buffers = {name: x for name, x in self.model.named_buffers() if name in self._constants}
        own: dict[str, Tensor] = {
            f"parameter '{n}'": p for n, p in self.model.named_parameters() if n in self._parameters
        }
        own |= {f"buffer '{name}'": x for name, x in buffers.items()} | self._others(buffers)
        return own | {f"the batch's tensor {k}": x for k, x in enumerate(self.batches.tensors)}

    def _others(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Constants of the graph that are no buffers."""
        return {f"constant '{name}'": x for name, x in self._constants.items() if name not in buffers}


def check_unchanged(watch: Watch, what: str, advice: str) -> None:
    """Raise :class:`StaleError` if something changed since ``what``; ``advice`` says what to do."""
    changed = watch.changes()
    if changed:
        named = ", ".join(changed[:4]) + (" …" if len(changed) > 4 else "")
        raise StaleError(f"{named} changed since {what}: {advice}")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether the values are the same; NaN is no change of a NaN."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _identity(x: Tensor) -> tuple[Any, ...]:
    """What stays while a tensor is this one; its version, which counts writes, comes last."""
    strides = x.stride() if x.layout is torch.strided else None
    return id(x), x.data_ptr(), x.shape, strides, x.dtype, 0 if x.is_inference() else x._version


def _some(x: Tensor) -> Tensor:
    """Some elements of a tensor's memory, where they lie."""
    length = x.untyped_storage().nbytes() // x.itemsize if x.layout is torch.strided else 0
    return x.detach().as_strided((-(-length // _step(length)),), (_step(length),), 0)


def _step(length: int) -> int:
    return max(1, length // _SAMPLES)
