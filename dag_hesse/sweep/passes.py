"""Tangent and adjoint passes alone, without second-order terms; they may stop at nodes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from dag_hesse.rules.base import ALL
from dag_hesse.sweep.linearize import Linearization


def push(
    lin: Linearization, seeds: Mapping[int, Tensor], reads: Collection[int], stop: Collection[int] = ()
) -> dict[int, Tensor]:
    """Tangents Σ J[u←v] ẋ_v at ``reads``, (probes, *node); those that arrive at ``stop`` go no further."""
    tangents, found = dict(seeds), {k: x for k, x in seeds.items() if k in reads}
    onward = lin.graph.ancestors(reads)
    with torch.no_grad():
        for node in lin.graph.nodes[min(seeds) + 1 : max(reads) + 1]:
            call = lin.calls.get(node.index)
            given = {slot: tangents[k] for slot, k in enumerate(node.inputs) if k in tangents and lin.active[k]}
            if call is None or not given or not onward[node.index]:
                continue
            moved, _ = call.push(given, True, ())
            if moved is None:
                continue
            total = moved + seeds[node.index] if node.index in seeds else moved
            if node.index in reads:
                found[node.index] = total
            if node.index not in stop:
                tangents[node.index] = total
    return found


def pull(
    lin: Linearization, given: Mapping[int, Tensor], reads: Collection[int], stop: Collection[int] = ()
) -> dict[int, Tensor]:
    """Adjoints Σ J[u←v]ᵀ ū_u at ``reads``, (probes, *node); those that arrive at ``stop`` go no further."""
    adjoints, found = dict(given), dict[int, Tensor]()
    onward = lin.graph.descendants(reads)
    with torch.no_grad():
        for node in reversed(lin.graph.nodes[min(reads) : max(given) + 1]):
            mine, call = adjoints.pop(node.index, None), lin.calls.get(node.index)
            if mine is None:
                continue
            if node.index in reads:
                found[node.index] = mine
            if call is None or (node.index in stop and node.index not in given) or not onward[node.index]:
                continue
            slots = [slot for slot, k in enumerate(node.inputs) if lin.active[k] and onward[k]]
            for slot, term in call.pull(mine, None, ALL, slots, {}).items():
                k = node.inputs[slot]
                adjoints[k] = adjoints[k] + term if k in adjoints else term
    return found
