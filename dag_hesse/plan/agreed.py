"""One plan for several ranks: the first one's, where all have the same zeros."""

from __future__ import annotations

from dataclasses import fields, replace

from dag_hesse.errors import RankError
from dag_hesse.plan.data import Plan
from dag_hesse.ranks import Ranks


def agreed(plan: Plan, ranks: Ranks) -> Plan:
    """What the first rank planned for its batches, over this one's structure.

    Raises:
        RankError: ranks have other points, or other zeros: what each sees depends on its samples.
    """
    structure = plan.structure
    zeros = (structure.names, structure.gn_alive.tolist(), structure.tensor_alive.tolist())
    choices = {field.name: getattr(plan, field.name) for field in fields(plan) if field.name != "structure"}
    every = ranks.told("a plan", (zeros, choices))
    if any(theirs != zeros for theirs, _ in every):
        raise RankError("ranks have other points, or other blocks that are zero by structure: name points= on all.")
    return replace(plan, **every[0][1])
