"""One plan for several ranks: the first one's, where all have the same zeros."""

from __future__ import annotations

from dataclasses import fields, replace

from dag_hesse._structure import Structure
from dag_hesse.errors import RankError
from dag_hesse.plan.data import Plan
from dag_hesse.ranks import Ranks


def agreed(plan: Plan, ranks: Ranks) -> Plan:
    """What the first rank planned for its batches, over this one's structure.

    Raises:
        RankError: ranks have other points, or other zeros: what each sees depends on its samples.
    """
    choices = {field.name: getattr(plan, field.name) for field in fields(plan) if field.name != "structure"}
    check_zeros(plan.structure, ranks)
    return replace(plan, **ranks.told("a plan", choices)[0])


def check_zeros(structure: Structure, ranks: Ranks) -> None:
    """See that all ranks have the same points, and the same zeros.

    Raises:
        RankError: they do not.
    """
    zeros = (structure.names, structure.gn_alive.tolist(), structure.tensor_alive.tolist())
    if any(theirs != zeros for theirs in ranks.told("a structure", zeros)):
        raise RankError("ranks have other points, or other blocks that are zero by structure: name points= on all.")
