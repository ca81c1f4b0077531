"""What a rule is; its constructors, named after the kinds of rules, are in ``linear``, ``elementwise``, ``bilinear``.

A rule is *linearized* once, on the values of one call; after that it is a set of linear products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Any

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Node, Ref, execute
from dag_hesse.kernels.arena import SYSTEM, Arena
from dag_hesse.kernels.elementwise import Coefficient

Tangents = Mapping[int, Tensor]
Pairs = frozenset[tuple[int, int]]
Buffers = Mapping[int, Tensor]  # per slot, what a result may be added to
Residual = Any  # what a call saves of a tangent pass for the adjoint pass that follows
ALL = slice(None)
Run = Callable[[Node, Sequence[Tensor], Arena], Tensor]
Partials = Callable[["Call"], tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]]


@dataclass(frozen=True, slots=True)
class Call:
    """One node with the values it had: what a rule is linearized on.

    Attributes:
        node: the node.
        values: one tensor per input slot; for a region, its members' values follow.
        value: the node's own value.
        active: per slot, whether a point reaches that input.
        curved: whether its second-order term will be asked for.
        arena: where products are written.
    """

    node: Node
    values: tuple[Tensor, ...]
    value: Tensor
    active: tuple[bool, ...]
    curved: bool = True
    arena: Arena = SYSTEM

    def shape(self, slot: int = 0) -> torch.Size:
        """Shape of the ``slot``-th tensor input."""
        return self.values[slot].shape

    def argument(self, position: int, name: str = "", default: Any = None) -> Any:
        """The op's argument at ``position`` (or keyword ``name``), tensors put in."""
        if position < len(self.node.args):
            arg = self.node.args[position]
        else:
            arg = self.node.kwargs.get(name, default)
        if isinstance(arg, Ref):
            return self.values[arg.slot]
        return arg

    def slot(self, position: int) -> int | None:
        """The input slot of the argument at ``position``; None if it is not a tensor."""
        arg = self.node.args[position] if position < len(self.node.args) else None
        return arg.slot if isinstance(arg, Ref) else None


class Linearized(ABC):
    """One call as linear maps: :meth:`bind` once, then :meth:`push` and :meth:`pull` any number of times.

    Every tensor has a leading axis of rows: probes, or probes of both channels. ``push`` and ``pull`` look at no values
    on the host, so that a whole sweep can be recorded and replayed. A tensor that is returned is new, a view of what
    was given, or a buffer of ``into``.
    """

    def bind(self, lam: Tensor | None, slots: Sequence[int], into: Buffers) -> dict[int, Tensor]:
        """Take λ = ∂L/∂output, (1, *output), or None where none arrives; return D_slotᵀ λ, (1, *input), per slot.

        What the second-order term needs of λ is kept, and what only that needed is given up. ``into`` is as for
        :meth:`pull`.
        """
        return {} if lam is None else self.pull(lam, None, ALL, slots, into)

    @abstractmethod
    def push(self, tangents: Tangents, onward: bool, curved: Sequence[int]) -> tuple[Tensor | None, Residual]:
        """Return the output tangent Σ_i D_i ẋ_i, (rows, *output), where ``onward`` asks for it, and a residual.

        The residual is what :meth:`pull` takes of these tangents for the second-order terms of the slots in ``curved``;
        None where those terms are zero, as they are before a λ was bound.
        """

    @abstractmethod
    def pull(
        self, abar: Tensor | None, residual: Residual, rows: slice, slots: Sequence[int], into: Buffers
    ) -> dict[int, Tensor]:
        """Return D_slotᵀ ā per slot, (rows, *input), with the second-order term of ``residual`` added to its ``rows``.

        One of ``abar``, (rows, *output), and ``residual`` may be None; a slot whose term is zero may be left out then.
        A slot's result may be added to its buffer in ``into``, where that is less work: the buffer is what is returned.
        """


class Samples(Enum):
    """What an op does to the axis of the samples, as :mod:`dag_hesse._capture.families` follows it."""

    AFFINE = auto()  # per image channel, along axis 1, by statistics that are given
    BAGS = auto()  # sums of rows of a table, a bag each
    CAT = auto()
    CONVOLUTION = auto()
    CREATED = auto()  # a tensor of some shape, whose values depend on no input
    ELEMENTWISE = auto()
    EXPAND = auto()
    FLIP = auto()
    INDEX = auto()  # picks and writes by index
    LEADING = auto()  # the same to every slice of the first axis
    PAD = auto()
    PERMUTE = auto()
    PRODUCT = auto()  # of matrices, or stacks of them
    REDUCTION = auto()
    REPEAT = auto()
    RESHAPE = auto()
    ROLL = auto()
    ROWS = auto()  # rows of a table, picked by an index
    SELECT = auto()
    SELECT_WRITE = auto()
    SEQUENCE = auto()  # mixes elements along some axes
    SLICE = auto()
    SLICE_WRITE = auto()
    SPATIAL = auto()  # over trailing axes, whose number is in the op's name
    STACK = auto()
    SUM = auto()  # a reduction that is linear
    TRANSPOSE = auto()
    UNFOLD = auto()
    UNKNOWN = auto()  # it is tried on random values


class Moves(Flag):
    """What an op that computes nothing does with its input's elements."""

    SAME = auto()  # with a result of the input's shape it is an identity
    ORDERED = auto()  # all elements, in their order
    VIEW = auto()  # the result lies in the input's memory


NOTHING = Moves(0)
Shapes = Sequence[tuple[int, ...]]


def as_it_is(node: Node, inputs: Sequence[Tensor], arena: Arena) -> Tensor:
    """Run the op itself."""
    return execute(node, inputs)


def per_element(node: Node, shapes: Shapes) -> int:
    """FLOPs of an op that takes one for every element of its result."""
    return node.numel


def no_workspace(node: Node, shapes: Shapes, rows: int) -> int:
    """Bytes beside operands and results: none."""
    return 0


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table: everything that the stages know of an op.

    Attributes:
        kind: of the node (what it may be fused with, what the structure proves of it).
        linearize: a call as linear maps. What it keeps and saves is found by running it on shapes (``footprint``).
        pairs: slot pairs with a second derivative.
        samples: what it does to the axis of the samples.
        partials: of an elementwise op, which may be fused into regions; with ``align``, only where nothing but its
            first input is active.
        run: evaluates the op itself, where a memory layout suits its products.
        moves: what it does with elements, where it computes nothing.
        linear: in all its tensor inputs jointly, but for a constant: a sum over samples stays one.
        flops: ``(node, shapes of its inputs) -> FLOPs`` of one linear product through it.
        shifted: position of the argument that names an axis along which a constant may be added without effect.
        workspace: ``(node, shapes, rows) -> bytes`` that a product of so many rows takes beside what it reads and
            returns; of 0 rows, the op itself.
        unpooled: the same of what the pool does not give: its free memory lies idle meanwhile.
    """

    kind: Kind
    linearize: Callable[[Call], Linearized]
    pairs: Callable[[Node], Pairs]
    samples: Samples
    partials: Partials | None = None
    align: Callable[[Call, int], tuple[int, ...]] | None = None
    run: Run = as_it_is
    moves: Moves = NOTHING
    linear: bool = False
    shifted: int | None = None
    flops: Callable[[Node, Shapes], int] = per_element
    workspace: Callable[[Node, Shapes, int], int] = no_workspace
    unpooled: Callable[[Node, Shapes, int], int] = no_workspace


def no_pairs(node: Node) -> Pairs:
    """The op is linear in its tensor inputs jointly (or piecewise so)."""
    return frozenset()


def own_pair(node: Node) -> Pairs:
    """The op is nonlinear in its one differentiable input."""
    return frozenset({(0, 0)})
