"""A model captured and planned, of which maps are made."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

from torch import nn

from dag_hesse._capture import Batches, capture_all, needs_split, points_like, unwrapped
from dag_hesse._capture.additivity import find_reduction
from dag_hesse._capture.losses import Loss, loss_text
from dag_hesse._capture.points import Names
from dag_hesse._capture.reduction import Option
from dag_hesse._capture.whole import whole_lines
from dag_hesse._structure import analyze_structure, curved_ops
from dag_hesse.budget import Budget
from dag_hesse.errors import OptionError, choose, flag, integer
from dag_hesse.estimate import assemble, estimate
from dag_hesse.estimate.run import Progress
from dag_hesse.gathered import gathered, is_sharded
from dag_hesse.ir import CurvatureGraph, Point
from dag_hesse.kernels.dispatch import failures
from dag_hesse.measure import precision
from dag_hesse.options import checked_options
from dag_hesse.plan import Plan, fuse_all, plan
from dag_hesse.plan.agreed import agreed
from dag_hesse.plan.planner import BATCH_MODES, MODES
from dag_hesse.plan.task import Pairs, asked_pairs, checked_pairs, named_by
from dag_hesse.progress import shown
from dag_hesse.ranks import Ranks, together, whole_model
from dag_hesse.report import CurvatureReport
from dag_hesse.report.blocks import BlockReader
from dag_hesse.sweep import VERIFY, Problem, capture_anew, prove_all
from dag_hesse.sweep.replay import refused


class Mapper:
    """A model captured and planned, of which maps are made: :meth:`report`, and after :meth:`refresh` another one.

    Args and errors are those of :func:`analyze`, which makes one map.

    Examples:
        >>> import torch
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
        >>> mapper = Mapper(model, batch, points="weight")
        >>> before = mapper.report().resonance
        >>> _ = model.weight.data.mul_(9)
        >>> mapper.refresh()
        >>> bool(mapper.report().resonance < before)
        True
    """

    @checked_options()
    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        loss: Loss | None = None,
        output: str | None = None,
        points: Names | None = None,
        pairs: Pairs | None = None,
        space: str = "activation",
        batch_mode: str = "shared",
        mode: str = "auto",
        probes: int = 32,
        rtol: float | None = None,
        stable_rank: bool = True,
        reduction: Option = None,
        memory: int | str | None = None,
        seed: int = 0,
        verify: str = "gradient",
        compile: bool = False,
        mesh: Any = None,
    ) -> None:
        choose("mode", mode, MODES)
        choose("batch_mode", batch_mode, BATCH_MODES)
        choose("verify", verify, VERIFY)
        flag("compile", compile)
        flag("stable_rank", stable_rank)
        probes, self.seed = integer("probes", probes, 2, "a standard error needs two"), integer("seed", seed)
        _check_rtol(rtol)
        self._clock = {"start": time.perf_counter()}
        self._ranks = None if mesh is None else Ranks(mesh)
        if self._ranks is not None and batch_mode != "shared":
            raise OptionError("mesh= takes batch_mode='shared': samples lie on other ranks.")
        self.space, self.mode, self.rtol = space, mode, rtol
        wanted = checked_pairs(pairs)
        self._points = named_by(wanted) if points is None else points
        self._asked = {
            "space=": space,
            "mode=": mode,
            "probes=": probes,
            "pairs=": wanted,
            "rtol=": rtol,
            "stable_rank=": stable_rank,
            "seed=": seed,
        }
        self._asked |= {"batch_mode=": batch_mode, "output=": output, "loss=": loss}
        self._loss, self._output, self._verify = loss, output, verify
        self._batch_mode, self._reduction, self._memory, self._compile = batch_mode, reduction, memory, compile
        with together(self._ranks, "making the map"):
            self._given = unwrapped(model) if self._ranks is None else whole_model(model)
            self.model = self._whole_model()
            self.batches = Batches(batch, memory, self.model, loss)
            self.batches.check_batch_mode(batch_mode)
            self._plan_of = partial(
                _plan,
                wanted,
                mode=mode,
                batch_mode=batch_mode,
                probes=probes,
                memory=memory,
                device=self.batches.device,
                stable_rank=stable_rank,
            )
            self._set_up()

    def _whole_model(self) -> nn.Module:
        """The model, or a copy that has whole parameters where ranks have parts of them."""
        if self._ranks is None or not is_sharded(self._given):
            return self._given
        return gathered(self._given, self._ranks, Budget.of(self._memory))

    def _set_up(self) -> None:
        """Capture, plan, prove and pose the problem."""
        model, batches, loss, output = self.model, self.batches, self._loss, self._output
        graphs = capture_all(model, batches, loss=loss, output=output, points=self._points, space=self.space)
        needs_split(graphs)
        self._curved_ops = curved_ops(graphs[0])
        self._whole = whole_lines(graphs[0]) if self._batch_mode == "shared" else []
        self._clock["capture"] = time.perf_counter()
        swept = fuse_all(graphs)
        self.plan = self._plan_of(graphs, swept)
        self._clock["plan"] = time.perf_counter()
        prove_all(graphs, batches, model, loss, output, self._verify)
        self._clock["proof"] = time.perf_counter()
        per_sample = self._batch_mode == "per_sample"
        self._added = find_reduction(
            model, graphs, batches, loss, self._reduction, per_sample=per_sample, ranks=self._ranks
        )
        self._like = partial(points_like, graphs[0], model)
        self.points = graphs[0].points
        self.problem = self._posed(swept)
        settled = self.problem.settled()
        if any(now is not before for now, before in zip(settled, swept, strict=True)):  # planned is what others need
            needs_split(settled)
            self.plan = self._plan_of(settled, settled)
            self.problem = self._posed(settled)
        if self._ranks is not None:
            self.problem.meet()
            self.plan = agreed(self.plan, self._ranks)
            self.problem = self._posed(settled)

    def _posed(self, graphs: Sequence[CurvatureGraph]) -> Problem:
        return Problem(
            self.model,
            graphs,
            self.batches,
            self._batch_mode,
            reduction=self._added,
            tensor_part=bool(self.plan.structure.tensor_alive.any()),
            with_out=self.plan.gram_columns > 0,
            chunk=self.plan.chunk,
            again=partial(
                capture_anew,
                self.model,
                loss=self._loss,
                output=self._output,
                points=self._like,
                space=self.space,
                verify=self._verify,
            ),
            loss=self._loss,
            memory=self._memory,
            compiled=self._compile,
            ranks=self._ranks,
            asked={"what is made": "a map", **self._asked},
        )

    def report(self, progress: Progress | bool | None = False, call: str = "") -> CurvatureReport:
        """The map at the values that the parameters had when they were last looked at.

        ``progress`` as for :func:`analyze`; ``call``: the code that the report says it was made by.
        """
        with together(self._ranks, "the map"), shown(progress) as told:
            norms = estimate(self.problem, self.plan, rtol=self.rtol, seed=self.seed, progress=told)
            metrics = assemble(norms, self.plan)
        self._clock["estimate"] = time.perf_counter()
        structure = self.plan.structure
        return CurvatureReport(
            self.points,
            metrics.values,
            metrics.stderr,
            metrics.method,
            structure.distance,
            structure.rank_bound,
            {
                **_facts(self.model, self.problem, self.plan, self.space, self.mode, self.seed, self._clock),
                "curved ops": self._curved_ops,
                "whole": self._whole,
                "loss function": loss_text(self._loss, next(iter(self.batches.examples.values()))),
                "one point": _why_one(self.points, self._points),
                "call": call,
            },
            BlockReader(self.problem),
        )

    def refresh(self) -> None:
        """Look at the parameters anew, as :meth:`dag_hesse.HessianOperator.refresh` does.

        Reports that were made before keep their numbers, but cannot make blocks any more (``StaleError``).
        """
        self._clock = {"start": time.perf_counter()}
        with together(self._ranks, "refresh()"):
            if self.model is not self._given:
                self.model = self._whole_model()
                self._set_up()
            elif self.problem.watch.alike():
                self.problem.renew()
                self.problem.meet()
            else:
                self._set_up()

    def release(self) -> None:
        """Give back the memory of linearizations and sweeps."""
        self.problem.release()
        self.problem.arena.retire()


def _plan(
    pairs: list[tuple[Any, Any]] | None,
    graphs: Sequence[CurvatureGraph],
    swept: Sequence[CurvatureGraph],
    **options: Any,
) -> Plan:
    """For graphs as they were captured and as they are swept, one a batch."""
    asked = asked_pairs(pairs, [point.name for point in graphs[0].points])
    distinct = {id(graph): (graph, fused) for graph, fused in zip(graphs, swept, strict=True)}
    structures = [replace(analyze_structure(graph), graph=fused) for graph, fused in distinct.values()]
    times = Counter(map(id, graphs))
    return plan(structures, counts=[times[k] for k in distinct], asked=asked, **options)


def _why_one(points: Sequence[Point], asked: Names | None) -> str:
    """Why a map that nobody asked points of has but one; empty for others."""
    if asked is not None or len(points) > 1:
        return ""
    return (
        f"only '{points[0].name}' was found in the module tree: name points=, tap() tensors in the forward, or take "
        "space='parameter'"
    )


def _check_rtol(rtol: Any) -> None:
    if rtol is not None and not (isinstance(rtol, Real) and 0 < rtol < 1):  # type: ignore[operator]
        raise OptionError(f"rtol={rtol!r}; expected a relative error between 0 and 1, or None.")


def _facts(
    model: nn.Module,
    problem: Problem,
    chosen: Plan,
    space: str,
    mode: str,
    seed: int,
    clock: dict[str, float],
) -> dict[str, Any]:
    stamps = list(clock.items())
    seconds = {name: t - before for (_, before), (name, t) in itertools.pairwise(stamps)}
    return {
        "model": type(model).__name__,
        "loss": problem.loss,
        "batch_size": problem.total,
        "batch_mode": problem.batch_mode,
        "reduction": str(problem.reduction),
        "space": space,
        "training": model.training,
        "mode": mode,
        "seed": seed,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": str(problem.device),
        "opaque": sorted({node.op for node in problem.entries[0].graph.opaque}),
        "lost": list(problem.entries[0].graph.lost),
        "kernels that failed": failures(),
        "not recorded": sorted(refused),
        "compiled": problem.compiled,
        "precision": precision(problem.device, problem.dtype),
        "sweeps": problem.sweeps + chosen.gram_columns,
        "predicted_flops": chosen.flops,
        "seconds": {**seconds, "total": stamps[-1][1] - stamps[0][1]},
    }
