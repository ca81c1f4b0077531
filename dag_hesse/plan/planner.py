"""From structure and options to a plan: which pairs by which method, from which source, reading what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dag_hesse._structure import Structure
from dag_hesse.budget import Budget, human
from dag_hesse.errors import BatchCouplingError, MemoryBudgetError, choose, integer
from dag_hesse.plan.cost import Cost
from dag_hesse.plan.data import Method, Methods, Plan, Source
from dag_hesse.plan.gram import GramRoute, can_gram, gram_route
from dag_hesse.plan.memory import probe_chunk, sweep_bytes
from dag_hesse.plan.sources import sources_of, spectral_cost
from dag_hesse.plan.task import Pair, Task

MODES = ("auto", "exact", "gram", "probes")
BATCH_MODES = ("shared", "per_sample", "joint")


def plan(
    structures: Sequence[Structure],
    *,
    counts: Sequence[int] | None = None,
    mode: str = "auto",
    batch_mode: str = "shared",
    probes: int = 32,
    memory: int | str | None = None,
    device: torch.device | None = None,
    asked: frozenset[Pair] | None = None,
    stable_rank: bool = True,
) -> Plan:
    """Choose methods, sources and probe chunks.

    Args:
        structures: one per distinct graph of the stream (usually one); all have the same points.
        counts: batches of every structure; None: one each.
        mode: ``"auto"`` takes, per pair, the first that applies: structural zero, Gram (unless sweeps are exact too and
            cost less), exact where it needs no more sweeps than probes would, probes. ``"exact"``: identity probes
            everywhere. ``"gram"``: Gram for the GN parts whatever time it takes. ``"probes"``: estimates everywhere.
        batch_mode: meaning of the batch axis.
        probes: Rademacher probes per source.
        memory: bytes that the call may use, half of them for sweeps and results; None: what is free.
        device: where that is asked; None: in main memory.
        asked: the pairs of points to look at; None: all.
        stable_rank: whether sampled pairs' spectral norms are looked for.

    Raises:
        OptionError: unknown mode or batch mode, or no count of probes or bytes.
        BatchCouplingError: ``per_sample`` where samples interact.
        MemoryBudgetError: ``mode="exact"`` or ``"gram"`` beyond memory.
    """
    choose("mode", mode, MODES)
    choose("batch_mode", batch_mode, BATCH_MODES)
    counts = [1] * len(structures) if counts is None else counts
    probes = integer("probes", probes, 1)
    budget = Budget.of(memory, device).sweeps
    task = Task(structures, counts, mode, batch_mode, probes, budget, asked)
    _check_separable(task)
    route = _chosen_route(task)
    pairs = task.alive_pairs if route is None else task.curved_pairs
    if mode == "exact":
        _check_exact(task, pairs)
    sources = sources_of(task, pairs)
    whole, method = task.structure, _methods(task, sources)
    left_out = np.array(method == Method.PROBES) & (not stable_rank)
    gn_method = method if route is None else _unless(task.skipped, _everywhere(Method.GRAM, method.shape))
    per_probe = _bytes_per_probe(task)
    chunk = min(probe_chunk(per_probe, budget), probes)
    return Plan(
        structure=whole,
        method=_where(whole.alive, method),
        gn_method=_where(whole.gn_alive, gn_method),
        tensor_method=_where(whole.tensor_alive, method),
        rank_method=_where(whole.alive, _unless(left_out, method)),
        sources=tuple(sources),
        gram_columns=0 if route is None else route.columns,
        gram_cost=Cost() if route is None else route.cost,
        spectral_cost=spectral_cost(task, sources) if stable_rank else Cost(),
        chunk=chunk,
        peak_bytes=chunk * per_probe + (0 if route is None else route.held),
    )


def _chosen_route(task: Task) -> GramRoute | None:
    """The Gram route, if it is taken."""
    if task.mode not in ("auto", "gram") or not task.structure.gn_alive.any() or not can_gram(task.graphs):
        return None
    route = gram_route(task)
    if task.mode == "gram":
        _check_gram(task, route)
    return route if task.mode == "gram" or _pays(task, route) else None


def _pays(task: Task, route: GramRoute) -> bool:
    """Whether the Gram route is worth its cost, beside sweeps for all pairs."""
    # A pullback costs half of a probe's; exactness is worth a few probes more.
    few = route.columns <= 8 * task.probes * sum(task.counts)
    if not (few and route.feasible and route.held <= task.budget // 4):
        return False
    swept = sources_of(task, task.alive_pairs)
    if any(source.method is not Method.EXACT for source in swept):
        return True
    beside = sum(source.flops for source in sources_of(task, task.curved_pairs))
    return sum(source.flops for source in swept) >= route.cost.flops + beside


def _methods(task: Task, sources: Iterable[Source]) -> Methods:
    """How the full block's norm of every pair is obtained: what is alive and not swept is left to the Gram route."""
    method = _where(task.structure.alive, _everywhere(Method.GRAM, task.structure.alive.shape))
    for source in sources:
        for v in source.reads:
            method[v, source.point] = method[source.point, v] = source.method
    return _unless(task.skipped, method)


def _unless(skipped: NDArray[np.bool_], method: Methods) -> Methods:
    """``method`` but where it was not asked for."""
    found = method.copy()
    found[skipped] = Method.SKIPPED
    return found


def _where(alive: NDArray[np.bool_], method: Methods) -> Methods:
    """``method`` where something is alive, else zero."""
    found = _everywhere(Method.ZERO, alive.shape)
    found[alive] = method[alive]
    return found


def _everywhere(method: Method, shape: tuple[int, ...]) -> Methods:
    found = np.empty(shape, dtype=object)  # np.full would make strings of the members
    found[...] = method
    return found


def _bytes_per_probe(task: Task) -> int:
    """Peak memory of a sweep from all points to all points."""
    every = [site for point in task.graph.points for site in point.sites]
    return sweep_bytes(task.graph, every, every, 2 if task.structure.tensor_alive.any() else 1, task.batch_mode)


def _check_separable(task: Task) -> None:
    if task.batch_mode == "per_sample" and not all(graph.separable for graph in task.graphs):
        where = task.structure.coupled or "the loss"
        raise BatchCouplingError(
            f"batch_mode='per_sample' needs independent samples, but they interact at {where}: put BatchNorm into eval "
            "mode, or use batch_mode='shared' or 'joint'."
        )


def _check_exact(task: Task, pairs: Sequence[Pair]) -> None:
    """Whether the largest block that is swept fits into the budget, with what is read beside it."""
    dims = task.dims
    worst = max(pairs, key=lambda pair: dims[pair[0]] * dims[pair[1]], default=None)
    if worst is None:
        return
    source = min(worst, key=lambda k: dims[k])
    read = sum(dims[v] for v in range(len(dims)) if (v, source) in pairs or (source, v) in pairs)
    need = task.block_bytes * dims[source] * read
    if need > task.budget:
        side = int((task.budget / task.block_bytes) ** 0.5)
        raise MemoryBudgetError(
            f"mode='exact' needs {human(need)} for the blocks of '{task.structure.names[source]}' (block "
            f"{dims[worst[0]]} × {dims[worst[1]]}), {human(task.budget)} are allowed (half of memory=, or "
            f"of what is free), which is enough for blocks of about {side} × {side}: raise memory=, choose smaller "
            "points, or use mode='auto' or 'probes'."
        )


def _check_gram(task: Task, route: GramRoute) -> None:
    if route.held > task.budget:
        raise MemoryBudgetError(
            f"mode='gram' holds {human(route.held)} (a row of {sum(task.dims)} numbers for every output, "
            f"or the blocks), {human(task.budget)} are allowed (half of memory=, or of what is free): raise memory=, "
            "take fewer samples or smaller points, or use mode='auto' or 'probes'."
        )
