"""What an operator is of, all but its batches; with batches it is a problem, of graphs captured or known before."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from dag_hesse._capture import Batches, capture_all, needs_split, points_like
from dag_hesse._capture.additivity import find_reduction
from dag_hesse._capture.losses import Loss
from dag_hesse._capture.points import Names
from dag_hesse._capture.reduction import Option, Reduction
from dag_hesse._capture.whole import whole_lines
from dag_hesse.budget import Budget
from dag_hesse.ir import CurvatureGraph
from dag_hesse.operators.functional import read_parameters
from dag_hesse.operators.vectors import VectorForm
from dag_hesse.plan import fuse_all
from dag_hesse.plan.memory import probe_chunk, shared_chunk, sweep_bytes
from dag_hesse.ranks import Ranks
from dag_hesse.sweep import Problem, capture_anew, prove_all

Known = Mapping[Any, CurvatureGraph]


@dataclass(frozen=True)
class Posed:
    """A problem, and how its points make up vectors.

    Attributes:
        order: which point of the problem each segment is; None for a parameter that the loss does not depend on.
        known: the captured graphs, by the signature of their batches.
    """

    problem: Problem
    order: tuple[int | None, ...]
    form: VectorForm
    reduction: Reduction
    known: Known


def _tell_of_whole_points(graph: CurvatureGraph) -> None:
    """Warn where one perturbation for all samples is not what a point has."""
    for line in whole_lines(graph)[:1]:
        warnings.warn(f"{line}, not by one vector for all samples.", stacklevel=5)


@dataclass(frozen=True)
class Pose:
    """A model, its loss and points, and how they are swept. ``own``: names of the parameters, where those are meant.

    ``asked``: what else ranks must have asked alike, by name.
    """

    module: nn.Module
    loss: Loss | None
    own: Sequence[str]
    points: Names | None
    space: str
    output: str | None
    batch_mode: str
    reduction: Option
    verify: str
    budget: Budget
    compiled: bool
    part: str
    ranks: Ranks | None
    asked: Mapping[str, Any]

    def posed(self, batches: Batches, known: Known | None = None) -> Posed:
        """Capture what is not ``known``, prove it, and pose the problem."""
        module, ranks = self.module, self.ranks
        wanted: Any = partial(read_parameters, self.own, module) if self.own else self.points
        graphs = capture_all(
            module, batches, loss=self.loss, output=self.output, points=wanted, space=self.space, known=known
        )
        if self.part != "full":
            needs_split(graphs)
        if known is None and self.batch_mode == "shared":
            _tell_of_whole_points(graphs[0])
        like = partial(points_like, graphs[0], module)
        proved = [] if known is None else list(known.values())
        prove_all(graphs, batches, module, self.loss, self.output, self.verify, proved)
        reduction = find_reduction(module, graphs, batches, self.loss, self.reduction, ranks=ranks)
        fused = fuse_all(graphs)
        problem = Problem(
            module,
            fused,
            batches,
            self.batch_mode,
            reduction=reduction,
            with_out=False,
            again=partial(
                capture_anew,
                module,
                loss=self.loss,
                output=self.output,
                points=like,
                space=self.space,
                verify=self.verify,
            ),
            loss=self.loss,
            memory=self.budget.total,
            compiled=self.compiled,
            ranks=ranks,
            asked={**self.asked, "params=": list(self.own)},
        )
        problem.meet()
        problem.chunk = self._chunk(fused[0])
        found = {point.name: k for k, point in enumerate(problem.points)}
        # Points come in topological order; vectors keep the order of the model's (or the user's) parameters.
        every = [name for name, _ in module.named_parameters()]
        rest = sorted(found, key=lambda name: every.index(name) if name in every else found[name])
        names = list(self.own or rest)
        order = tuple(found.get(name) for name in names)
        captured = dict(zip(batches.signatures, graphs, strict=True))
        return Posed(problem, order, self._form(problem, names, order), reduction, captured)

    def _chunk(self, graph: CurvatureGraph) -> int:
        sites = [k for point in graph.points for k in point.sites]
        cap = self.budget.sweeps // 2  # vectors that come and go take as much
        per_probe = max(1, sweep_bytes(graph, sites, sites, batch_mode=self.batch_mode))
        if self.space == "parameter":  # vectors are large themselves, and chunks of them are copied together again
            return max(1, min(cap // per_probe, shared_chunk(graph, sites)))
        return probe_chunk(per_probe, cap)

    def _form(self, problem: Problem, names: Sequence[str], order: Sequence[int | None]) -> VectorForm:
        parameters = dict(self.module.named_parameters())
        shapes, dtypes = [], []
        for name, k in zip(names, order, strict=True):
            if k is None:  # the loss does not depend on it
                shapes.append(tuple(parameters[name].shape))
                dtypes.append(parameters[name].dtype)
                continue
            point = problem.points[k]
            whole = problem.batch_mode == "joint" and problem.groups == 1 and point.kind == "activation"
            shape = (problem.dim(k),) if whole else point.shape
            shapes.append(shape if problem.groups == 1 else (problem.groups, *shape))
            dtypes.append(problem.dtype_of(k))
        return VectorForm(tuple(names), tuple(shapes), problem.dtype, problem.device, tuple(dtypes))
