"""From a problem and options to a stored matrix: route, band, trimming, and what is known of errors."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dag_hesse._structure import Structure, analyze_structure
from dag_hesse.errors import BatchCouplingError, choose
from dag_hesse.plan.task import together
from dag_hesse.storage.bounds import RISK, spread
from dag_hesse.storage.cores import Cores, Pair
from dag_hesse.storage.draft import Draft
from dag_hesse.storage.options import PARTS, Wanted, check_room
from dag_hesse.storage.pairs import PairFacts, Storage, band_width, check_band, dropped_square, kind_of
from dag_hesse.storage.routes import drafted
from dag_hesse.storage.source import Progress, Source, stored_dtype
from dag_hesse.storage.trim import trim
from dag_hesse.sweep import Problem

_NEAR = 0.98  # of the error that is allowed
_ROUNDING = 16  # of the dtype's eps, times ‖H‖_F: what sums of products in it may be off by


@dataclass
class Built:
    """A stored part: its numbers, what is known of every pair, and of the whole."""

    cores: Cores
    pairs: dict[Pair, PairFacts]
    facts: dict[str, Any]


def structure_of(problem: Problem) -> Structure:
    """Of all batches together."""
    distinct = {id(graph): graph for graph in problem.graphs}
    return together([analyze_structure(graph) for graph in distinct.values()])


def alive_in(structure: Structure, part: str) -> NDArray[np.bool_]:
    """Where a part is not proved zero."""
    return {"full": structure.alive, "gn": structure.gn_alive, "tensor": structure.tensor_alive}[part]


def check(problem: Problem, structure: Structure, part: str, wanted: Wanted) -> None:
    """Refuse what cannot be, before anything is swept.

    Raises:
        OptionError: unknown part, or nothing to store.
        BatchCouplingError: a block for every sample's own loss.
        MemoryBudgetError: the budget is below the diagonal blocks'.
    """
    choose("part", part, PARTS)
    if problem.batch_mode == "per_sample":
        raise BatchCouplingError(
            "batch_mode='per_sample' has a block for each sample's own loss, which are no one matrix: use 'shared' or "
            "'joint'."
        )
    alive = [(int(v), int(w)) for v, w in zip(*np.nonzero(np.triu(alive_in(structure, part))), strict=True)]
    check_band(structure.distance, alive, wanted.band)
    dims = [problem.dim(k) for k in range(len(problem.points))]
    check_room(dims, len(alive), problem.groups * stored_dtype(problem).itemsize, wanted.memory)


def build(problem: Problem, structure: Structure, part: str, wanted: Wanted, progress: Progress | None = None) -> Built:
    """Store one part of a problem's Hessian."""
    check(problem, structure, part, wanted)
    start, before = time.perf_counter(), problem.sweeps
    source = Source(problem, part, alive_in(structure, part), wanted.seed, progress)
    gn_alone = part == "gn" or (part == "full" and not structure.tensor_alive.any())
    draft = drafted(source, wanted, gn_alone)
    norms = {pair: draft.cores.norm(*pair) for pair in draft.cores.cores}
    bounds = {pair: draft.bound(pair) for pair in norms}
    band = band_width(wanted, structure.distance, norms, bounds, draft.size)
    outside = [] if band is None else [pair for pair in norms if structure.distance[pair] > band]
    for pair in outside:
        del draft.cores.cores[pair]
    drop = 0.0 if band is None or wanted.rest == "live" else dropped_square(structure.distance, norms, bounds, band)
    lost = trim(draft.cores, _allowed(draft, wanted, drop), wanted.memory, wanted.rank)
    rounding = _ROUNDING * torch.finfo(source.dtype).eps * draft.size
    pairs = {}
    for v, w in zip(*np.triu_indices(len(source.dims)), strict=True):
        pair, distance = (int(v), int(w)), int(structure.distance[v, w])
        if pair in lost:
            kind, norm = kind_of(draft.cores, *pair), draft.cores.norm(*pair)
            pairs[pair] = PairFacts(kind, "", distance, norm, bounds[pair] + lost[pair] + rounding)
        elif pair in norms:
            live = wanted.rest == "live"
            kind, norm = (Storage.LIVE if live else Storage.ZERO), norms[pair]
            pairs[pair] = PairFacts(
                kind, "outside the band", distance, norm, 0.0 if live else norm + bounds[pair] + rounding
            )
        else:
            pairs[pair] = PairFacts(Storage.ZERO, "proved by structure", distance, 0.0, 0.0)
    facts = _facts(draft, lost, wanted, part, band, drop**0.5, rounding)
    facts |= {"sweeps": problem.sweeps - before, "seconds": time.perf_counter() - start}
    return Built(draft.cores, pairs, facts)


def _allowed(draft: Draft, wanted: Wanted, drop: float) -> float:
    """What trimming may lose: the rest of the error that is allowed."""
    if wanted.error is None:
        return 0.0
    spent = sum(x * x for x in draft.rows) + (drop if wanted.band == "error" else 0.0)
    return max(0.0, (_NEAR * wanted.error * draft.size) ** 2 - spent) ** 0.5


def _facts(
    draft: Draft, lost: dict[Pair, float], wanted: Wanted, part: str, band: int | None, dropped: float, rounding: float
) -> dict[str, Any]:
    trimmed = sum((1 if v == w else 2) * x * x for (v, w), x in lost.items()) ** 0.5
    measured = sum(x * x for x in draft.rows) ** 0.5
    return {
        "part": part,
        "route": draft.route,
        "band": band,
        "eps": wanted.eps,
        "size": draft.size,
        "error": _over((measured**2 + trimmed**2) ** 0.5, draft.size),
        "bound": spread() * measured + trimmed + rounding,
        "risk": RISK if measured else 0.0,
        "dropped": dropped,
        "target": wanted.error,
        "memory": wanted.memory,
        "history": draft.history,
        "pullbacks": draft.pullbacks,
    }


def _over(x: float, y: float) -> float:
    return x / y if y else 0.0
