"""How a tensor depends on the samples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dag_hesse.ir import BatchAxis, Interaction, Node
from dag_hesse.rules.table import RULES

if TYPE_CHECKING:
    from dag_hesse._capture.interaction import Walker


@dataclass(frozen=True, slots=True)
class State:
    """How a tensor depends on samples. ``one``: on the sample of this number alone; ``lost``: nobody knows where."""

    interaction: Interaction
    batch_axis: BatchAxis | None = None
    one: int = -1
    lost: bool = False

    @property
    def free(self) -> bool:
        """The same for all samples."""
        return self.interaction is Interaction.NONE and self.batch_axis is None and not self.lost


NONE = State(Interaction.NONE)
GONE = State(Interaction.MIXED)  # reduced over the batch: there is no batch axis any more
LOST = State(Interaction.MIXED, lost=True)


def separate(batch_axis: BatchAxis | None) -> State:
    """Slices along a batch axis that depend on their own sample; lost where there is none."""
    return LOST if batch_axis is None else State(Interaction.SEPARATE, batch_axis)


def mixed(batch_axis: BatchAxis | None) -> State:
    """Samples interact; their axis may still be known."""
    return State(Interaction.MIXED, batch_axis)


def option(node: Node, name: str, default: Any = None) -> Any:
    """An argument of the node's op by the name that its schema gives it."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name) if name in names else len(node.args)
    return node.args[place] if place < len(node.args) else default


Follow = Callable[["Walker", Node], State]


def is_elementwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_linear(node: Node) -> bool:
    """Whether a sum over samples stays one."""
    rule = RULES.get(node.op)
    return rule is not None and rule.linear
