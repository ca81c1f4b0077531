"""The whole table: op name -> rule."""

from __future__ import annotations

from dag_hesse.ir.node import Kind, Node
from dag_hesse.rules import contraction, gather, pointwise, rowwise, structural
from dag_hesse.rules.base import Pairs, Rule
from dag_hesse.rules.opaque import OPAQUE
from dag_hesse.rules.region import REGION

RULES: dict[str, Rule] = {
    **structural.TABLE,
    **pointwise.TABLE,
    **contraction.TABLE,
    **gather.TABLE,
    **rowwise.TABLE,
}


# Nodes that passes make, rather than ops of a model.
SPECIAL: dict[str, Rule] = {"region": REGION}


def rule_for(node: Node) -> Rule:
    """Return the rule of a differentiable node: its row of the table, or OPAQUE."""
    return SPECIAL.get(node.op) or (OPAQUE if node.kind is Kind.OPAQUE else RULES[node.op])


def pairs_of(node: Node) -> Pairs:
    """Slot pairs of ``node`` that have a second derivative; empty for leaves and constants."""
    if node.kind in (Kind.INPUT, Kind.PARAM, Kind.CONST):
        return frozenset()
    return rule_for(node).pairs(node)
