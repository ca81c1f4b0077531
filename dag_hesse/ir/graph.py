"""The graph: nodes in topological order, and what names and batch axes mean in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from math import prod

import torch

from dag_hesse.ir.node import Guard, Kind, Node
from dag_hesse.randomness import RandomState


class Interaction(str, Enum):
    """How a node's tensor depends on the samples of the batch."""

    NONE = "none"  # the same for every sample: parameters, constants
    SEPARATE = "separate"  # slice b depends on sample b alone
    SUMMED = "summed"  # a sum over samples of per-sample terms (a reduced loss)
    MIXED = "mixed"  # samples interact

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class BatchAxis:
    """Where the samples lie: ``axis`` has size ``outer · batch · inner``; the middle factor counts samples.

    Those of the whole batch, in a graph; in the walk that finds them also some, from number ``start`` on.
    """

    axis: int
    outer: int
    batch: int
    inner: int
    start: int = 0

    @property
    def size(self) -> int:
        """Of the axis."""
        return self.outer * self.batch * self.inner

    def at(self, axis: int) -> BatchAxis:
        """The same along another axis."""
        return replace(self, axis=axis)

    def line(self) -> torch.Tensor:
        """The sample number at every place of the axis."""
        return self.start + torch.arange(self.size, device="cpu") // self.inner % self.batch

    def whole(self, batch: int) -> BatchAxis | None:
        """Itself, where it holds all samples of the batch."""
        return self if self.batch == batch and self.start == 0 else None


@dataclass(frozen=True, slots=True)
class Point:
    """A place where curvature is measured: a module's output, a tap, or parameters.

    Attributes:
        name: module path, tap name, or parameter name.
        shape: shape without the batch axis (activation), or of the parameter; ``(dim,)`` if several are joined.
        dim: number of elements of ``shape``.
        kind: ``"activation"`` or ``"parameter"``.
        sites: node indices. Activations: one perturbation shared by all sites. Parameters: concatenated.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    kind: str
    sites: tuple[int, ...] = field(default=(), repr=False)


@dataclass(slots=True)
class CurvatureGraph:
    """Model and loss as one list of typed nodes in topological order (design §3, IR).

    ``parameters`` and ``inputs`` map names to nodes, ``constants`` holds the tensors of CONST leaves, ``taps`` maps
    a point name to its nodes in call order, ``out`` lists the nodes that the loss consumes.
    """

    nodes: list[Node]
    loss: int
    out: tuple[int, ...]
    batch_size: int
    parameters: dict[str, int]
    inputs: dict[int, int]  # node -> position among the batch's flattened tensors
    constants: dict[int, torch.Tensor]
    taps: dict[str, tuple[int, ...]]
    modules: dict[str, str] = field(default_factory=dict)  # module path -> class name, in call order
    points: tuple[Point, ...] = ()
    children: list[list[int]] = field(default_factory=list, repr=False)
    batch_axes: list[BatchAxis | None] = field(default_factory=list, repr=False)
    interactions: list[Interaction] = field(default_factory=list, repr=False)
    separable_loss: bool = False  # whether the loss is a sum over samples of functions of their own slice of out
    separable: bool = False  # whether, moreover, out's slices depend on their own sample alone
    split: bool = True  # whether ``out`` is known; where not, it is the loss, and there is no Gauss–Newton part
    guards: tuple[Guard, ...] = ()  # values that Python looked at
    batch_bound: bool = False  # whether the forward made constants out of sight: the graph is of its own batch only
    value: float = float("nan")  # of the loss, as it was recorded
    written: tuple[torch.Tensor, ...] = ()  # tensors of the model's that its forward writes to
    rng_before: RandomState | None = None  # random states around the recorded forward
    rng_after: RandomState | None = None
    unused: frozenset[str] = frozenset()  # taps that the loss does not depend on
    ends: list[str] = field(default_factory=list, repr=False)  # per node: why there is no batch axis, and where
    lost: tuple[str, ...] = ()  # where the batch axis could not be followed: op, module and line
    _in_loss: tuple[tuple[int, ...], int, list[bool]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.children:
            self.children = [[] for _ in self.nodes]
            for node in self.nodes:
                for parent in dict.fromkeys(node.inputs):
                    self.children[parent].append(node.index)

    def __str__(self) -> str:
        from dag_hesse.ir.printer import render

        return render(self)

    @property
    def opaque(self) -> tuple[Node, ...]:
        """Nodes differentiated by autograd on their op alone."""
        return tuple(node for node in self.nodes if node.kind is Kind.OPAQUE)

    def looked_alike(self, other: CurvatureGraph) -> bool:
        """Whether Python saw the same values and shapes when the other graph was captured."""
        if len(self.guards) != len(other.guards):
            return False
        return all(mine.saw(theirs) for mine, theirs in zip(self.guards, other.guards, strict=True))

    def descendants(self, sites: Iterable[int]) -> list[bool]:
        """Mark the nodes that a derivative reaches from ``sites`` (which are included)."""
        marked = [False] * len(self.nodes)
        for site in sites:
            marked[site] = True
        for node in self.nodes:
            if not marked[node.index] and node.kind is not Kind.CONST:
                marked[node.index] = any(marked[parent] for parent in node.inputs)
        return marked

    def ancestors(self, sinks: Iterable[int]) -> list[bool]:
        """Mark the nodes from which a derivative reaches one of ``sinks`` (which are included)."""
        marked = [False] * len(self.nodes)
        for sink in sinks:
            marked[sink] = True
        for node in reversed(self.nodes):
            if marked[node.index] and node.kind is not Kind.CONST:
                for parent in node.inputs:
                    inner = self.nodes[parent]
                    marked[parent] = marked[parent] or (inner.is_float and inner.numel > 0)
        return marked

    def active(self, sites: Iterable[int]) -> list[bool]:
        """Mark the nodes between ``sites`` and the loss: what a sweep from them passes."""
        return [a and b for a, b in zip(self.descendants(sites), self.ancestors([self.loss]), strict=True)]

    @property
    def loss_subgraph(self) -> list[bool]:
        """Mark the ops downstream of ``out``: their second-order terms make the GN channel (design §2.2)."""
        if self._in_loss is None or self._in_loss[:2] != (self.out, len(self.nodes)):
            self._in_loss = self.out, len(self.nodes), self._find_loss_subgraph()
        return self._in_loss[2]

    def _find_loss_subgraph(self) -> list[bool]:
        marked = self.descendants(self.out)
        for index in self.out:
            marked[index] = any(marked[parent] for parent in self.nodes[index].inputs)
        return marked

    def per_sample_numel(self, index: int) -> int:
        """Real numbers of a node's tensor that belong to one sample."""
        node = self.nodes[index]
        each = 2 if node.dtype.is_complex else 1
        if (
            self.interactions
            and self.interactions[index] in (Interaction.SEPARATE, Interaction.MIXED)
            and self.batch_axes[index]
        ):
            return each * node.numel // self.batch_size
        return each * prod(node.shape)
