"""Whether what a linearization was made of is still what it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dag_hesse.capture import Batches
from dag_hesse.ir import CurvatureGraph

_SAMPLES = 64  # elements of a tensor that are looked at


class Watch:
    """Notes parameters, the buffers that a graph reads, and the batches that are held.

    Version counters miss what goes through ``.data``, so the memory that tensors lie in is noted too, and some of
    their elements.

    Example:
        >>> import torch, dag_hesse
        >>> from torch import nn
        >>> model = nn.Linear(2, 1)
        >>> graph = dag_hesse.capture(model, (torch.ones(1, 2), torch.ones(1, 1)))
        >>> watch = Watch(model, [graph], Batches((torch.ones(1, 2), torch.ones(1, 1))))
        >>> _ = model.weight.data.mul_(2)
        >>> watch.changes()
        ["parameter 'weight'"]
    """

    def __init__(self, model: nn.Module, graphs: Iterable[CurvatureGraph], batches: Batches) -> None:
        self.model, self.batches = model, batches
        graphs = list({id(graph): graph for graph in graphs}.values())
        self._parameters = {name for graph in graphs for name in graph.parameters}
        self._constants = {
            f"'{graph.nodes[k].name}'": value for graph in graphs for k, value in graph.constants.items()
        }
        self.note()

    def note(self) -> None:
        """Take everything as it is now for what it should be."""
        self._training = self.modes()
        now = self._present()
        self._marks = {name: _mark(x) for name, x in now.items()}
        self._views = {name: _some(x) for name, x in now.items()}
        alike: dict[Any, list[str]] = {}
        for name, view in self._views.items():
            alike.setdefault((view.dtype, view.device), []).append(name)
        self._groups = list(alike.values())
        self._values = [self._elements(names) for names in self._groups]

    def modes(self) -> list[bool]:
        """Which modules are in training mode."""
        return [module.training for module in self.model.modules()]

    def changed_modes(self) -> bool:
        """Whether a module went to another mode."""
        return self.modes() != self._training

    def changes(self) -> list[str]:
        """Names of what is not what it was."""
        found = [name for name, x in self._present().items() if self._marks.get(name) != _mark(x)]
        for names, old in zip(self._groups, self._values, strict=True):
            new = self._elements(names)
            if not torch.equal(new, old):
                pieces = zip(names, new.split(self._sizes(names)), old.split(self._sizes(names)), strict=True)
                found += [name for name, a, b in pieces if name not in found and not torch.equal(a, b)]
        return found + (["the training mode"] if self.changed_modes() else [])

    def _elements(self, names: list[str]) -> Tensor:
        return torch.cat([self._views[name] for name in names])

    def _sizes(self, names: list[str]) -> list[int]:
        return [len(self._views[name]) for name in names]

    def _present(self) -> dict[str, Tensor]:
        own = {f"parameter '{n}'": p for n, p in self.model.named_parameters() if n in self._parameters}
        held = {f"the batch's tensor {k}": x for k, x in enumerate(self.batches.tensors)}
        return own | {f"constant {name}": x for name, x in self._constants.items()} | held


def _mark(x: Tensor) -> Any:
    return id(x), x.data_ptr(), x._version, x.shape


def _some(x: Tensor) -> Tensor:
    """Some elements of a tensor's memory, where they lie."""
    length = x.untyped_storage().nbytes() // x.itemsize if x.layout is torch.strided else 0
    return x.detach().as_strided((-(-length // _step(length)),), (_step(length),), 0)


def _step(length: int) -> int:
    return max(1, length // _SAMPLES)
