"""The whole table: op name -> rule."""

from __future__ import annotations

from torch import Tensor

from dag_hesse.ir.node import Kind, Node, execute
from dag_hesse.kernels.arena import SYSTEM, Arena
from dag_hesse.rules import (
    attention,
    batch_norm,
    contraction,
    determinant,
    functions,
    gather,
    rowwise,
    special,
    structural,
)
from dag_hesse.rules.base import Pairs, Rule
from dag_hesse.rules.opaque import OPAQUE
from dag_hesse.rules.region import REGION, Region

RULES: dict[str, Rule] = {
    **structural.TABLE,
    **functions.TABLE,
    **special.TABLE,
    **contraction.TABLE,
    **gather.TABLE,
    **rowwise.TABLE,
    **attention.TABLE,
    **batch_norm.TABLE,
    **determinant.TABLE,
}


# Nodes that passes make, rather than ops of a model.
SPECIAL: dict[str, Rule] = {"region": REGION}


def rule_for(node: Node) -> Rule:
    """Return the rule of a differentiable node: its row of the table, or OPAQUE (complex tensors, say)."""
    return SPECIAL.get(node.op) or (OPAQUE if node.kind is Kind.OPAQUE else RULES[node.op])


def evaluate(node: Node, inputs: tuple[Tensor, ...], arena: Arena = SYSTEM) -> tuple[tuple[Tensor, ...], Tensor]:
    """What :class:`Call` holds of a node: values of its inputs (and, for a region, of its members), and its own."""
    if isinstance(node.target, Region):
        *known, value = node.target.values(inputs)
        return tuple(known), value
    rule = None if node.kind is Kind.OPAQUE else RULES.get(node.op)
    return inputs, execute(node, inputs) if rule is None else rule.run(node, inputs, arena)


def pairs_of(node: Node) -> Pairs:
    """Slot pairs of ``node`` that have a second derivative; empty for leaves and constants."""
    if not node.is_differentiable:
        return frozenset()
    return rule_for(node).pairs(node)
