"""One row per op: kind, jvp, vjp and second-order term together (design §3, rules)."""

from dag_hesse.rules.base import Call, Linearized, Rule
from dag_hesse.rules.lowering import decompositions
from dag_hesse.rules.table import RULES, rule_for

__all__ = ["RULES", "Call", "Linearized", "Rule", "decompositions", "rule_for"]
