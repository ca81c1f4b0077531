"""From a model, or from a report's problem, to a stored matrix with its parts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dag_hesse._capture import Batches, capture_all, needs_split, points_like, unwrapped
from dag_hesse._capture.additivity import find_reduction
from dag_hesse._capture.losses import Loss
from dag_hesse._capture.points import Names
from dag_hesse._capture.reduction import Option
from dag_hesse._structure import Structure
from dag_hesse.budget import Budget
from dag_hesse.errors import OptionError, choose, flag
from dag_hesse.gathered import gathered, is_sharded
from dag_hesse.operators.vectors import VectorForm
from dag_hesse.options import checked_options
from dag_hesse.plan import fuse_all
from dag_hesse.plan.agreed import check_zeros
from dag_hesse.plan.gram import can_gram
from dag_hesse.plan.memory import probe_chunk, sweep_bytes
from dag_hesse.progress import check_progress, shown
from dag_hesse.ranks import Ranks, together, whole_model
from dag_hesse.storage.build import Built, alive_in, build, check, structure_of
from dag_hesse.storage.cores import Cores
from dag_hesse.storage.live import Live
from dag_hesse.storage.matrix import BlockMatrix
from dag_hesse.storage.options import PARTS, Wanted, wanted
from dag_hesse.storage.pairs import PairFacts, Storage
from dag_hesse.storage.source import Progress, Source, stored_dtype
from dag_hesse.sweep import VERIFY, Problem, capture_anew, prove_all


@checked_options(wanted)
def from_model(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Names | None = None,
    space: str = "activation",
    batch_mode: str = "shared",
    reduction: Option = None,
    verify: str = "gradient",
    part: str = "full",
    parts: bool = False,
    progress: Progress | bool | None = None,
    mesh: Any = None,
    **options: Any,
) -> BlockMatrix:
    """As :meth:`dag_hesse.BlockMatrix.from_model`."""
    ranks = None if mesh is None else Ranks(mesh)
    with together(ranks, "making the matrix"):
        choose("batch_mode", batch_mode, ("shared", "joint"))
        choose("space", space, ("activation", "parameter"))
        choose("verify", verify, VERIFY)
        choose("part", part, PARTS)
        flag("parts", parts)
        check_progress(progress)
        if ranks is not None and batch_mode != "shared":
            raise OptionError("mesh= takes batch_mode='shared': samples lie on other ranks.")
        chosen, model = wanted(**options), unwrapped(model) if ranks is None else whole_model(model)
        if ranks is not None and is_sharded(model):
            model = gathered(model, ranks, Budget())
        batches = Batches(batch, None, model, loss)
        batches.check_batch_mode(batch_mode)
        graphs = capture_all(model, batches, loss=loss, output=output, points=points, space=space)
        if part != "full" or parts:
            needs_split(graphs)
        prove_all(graphs, batches, model, loss, output, verify)
        like = partial(points_like, graphs[0], model)
        fused = fuse_all(graphs)
        problem = Problem(
            model,
            fused,
            batches,
            batch_mode,
            reduction=find_reduction(model, graphs, batches, loss, reduction, ranks=ranks),
            with_out=can_gram(fused),
            again=partial(capture_anew, model, loss=loss, output=output, points=like, space=space, verify=verify),
            loss=loss,
            ranks=ranks,
            asked={"what is made": "a matrix", "loss=": loss, "output=": output, "space=": space, "part=": part}
            | {"parts=": parts, **{f"{name}=": value for name, value in options.items()}},
        )
        problem.meet()
        problem.settled()
        sites = [k for point in fused[0].points for k in point.sites]
        per_probe = sweep_bytes(fused[0], sites, sites, batch_mode=batch_mode)
        problem.chunk = probe_chunk(per_probe, Budget().sweeps // 2)
        with shown(progress) as told:
            return of_problem(problem, "the matrix was made", part, parts, chosen, told)


def of_problem(
    problem: Problem, made_by: str, part: str, parts: bool, chosen: Wanted, progress: Progress | None = None
) -> BlockMatrix:
    """Store one part of a problem's Hessian, and with ``parts`` the others beside it."""
    structure = structure_of(problem)
    with together(problem.ranks, "storing blocks"):
        check(problem, structure, part, chosen)
        if problem.ranks is not None:
            check_zeros(structure, problem.ranks)
            problem.chunk = problem.ranks.least("a chunk", problem.chunk)
        try:
            return _with_parts(problem, structure, made_by, part, parts, chosen, progress)
        finally:
            problem.release()


def _with_parts(
    problem: Problem,
    structure: Structure,
    made_by: str,
    part: str,
    parts: bool,
    chosen: Wanted,
    progress: Progress | None,
) -> BlockMatrix:
    others = [p for p in PARTS if p != part] if parts else []
    curved = bool(structure.tensor_alive.any())
    if others and chosen.memory is not None and curved:
        chosen = replace(chosen, memory=chosen.memory // len(PARTS))
    form = _form(problem)
    own = build(problem, structure, part, chosen, progress)
    live = _live(problem, structure, part, own, made_by)
    beside: dict[str, BlockMatrix] = {}
    for other in others:
        if not alive_in(structure, other).any():
            beside[other] = BlockMatrix(form, _nothing(problem, structure, other))
        elif not curved and {part, other} == {"full", "gn"}:  # they are the same matrix
            beside[other] = BlockMatrix(form, Built(own.cores, own.pairs, {**own.facts, "part": other}), live)
        else:
            found = build(problem, structure, other, chosen, progress)
            beside[other] = BlockMatrix(form, found, _live(problem, structure, other, found, made_by))
    return BlockMatrix(form, own, live, beside)


def _live(problem: Problem, structure: Structure, part: str, built: Built, made_by: str) -> Live | None:
    pairs = [pair for pair, facts in built.pairs.items() if facts.kind is Storage.LIVE]
    return Live(Source(problem, part, alive_in(structure, part), 0), pairs, made_by) if pairs else None


def _nothing(problem: Problem, structure: Structure, part: str) -> Built:
    """A part that is proved zero everywhere."""
    count = len(problem.points)
    dims = [problem.dim(k) for k in range(count)]
    zero = {
        (v, w): PairFacts(Storage.ZERO, "proved by structure", int(structure.distance[v, w]), 0.0, 0.0)
        for v in range(count)
        for w in range(v, count)
    }
    facts: dict[str, Any] = {
        "part": part,
        "route": "exact",
        "band": None,
        "eps": None,
        "target": None,
        "memory": None,
        "history": [],
    }
    facts |= dict.fromkeys(("size", "error", "bound", "risk", "dropped", "sweeps", "seconds", "pullbacks"), 0)
    return Built(Cores(dims, problem.groups, [None] * count, {}), zero, facts)


def _form(problem: Problem) -> VectorForm:
    """Vectors in the order of the points."""
    shapes: list[tuple[int, ...]] = []
    for k, point in enumerate(problem.points):
        whole = problem.batch_mode == "joint" and problem.groups == 1 and point.kind == "activation"
        shape = (problem.dim(k),) if whole else tuple(point.shape)
        shapes.append(shape if problem.groups == 1 else (problem.groups, *shape))
    names = tuple(point.name for point in problem.points)
    dtypes: tuple[torch.dtype, ...] = tuple(problem.dtype_of(k) for k in range(len(names)))
    return VectorForm(names, tuple(shapes), stored_dtype(problem), problem.device, dtypes)
