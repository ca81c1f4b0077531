"""What per-sample theory is measured on: activation points, the model's output among them, and independent samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from dag_hesse._capture import (
    Batches,
    capture_all,
    default_points,
    needs_split,
    points_like,
    resolve_points,
    unwrapped,
)
from dag_hesse._capture.additivity import find_reduction
from dag_hesse._capture.losses import Loss
from dag_hesse._structure import analyze_structure
from dag_hesse.errors import BatchCouplingError, OptionError, PointError, choose, kind_of, position
from dag_hesse.ir import CurvatureGraph, Point
from dag_hesse.plan import fuse_all
from dag_hesse.report import CurvatureReport
from dag_hesse.sweep import VERIFY, Linearization, Problem, capture_anew, prove_all
from dag_hesse.sweep.meaning import Entry

Names = Sequence[str] | str | None


@dataclass(frozen=True)
class Scene:
    """A posed problem of per-sample blocks. The last point is *out*, what the loss is a function of."""

    problem: Problem

    @property
    def points(self) -> tuple[Point, ...]:
        """In topological order, out last."""
        return self.problem.points

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the points."""
        return tuple(point.name for point in self.points)

    @property
    def graph(self) -> CurvatureGraph:
        """Of the first batch."""
        return self.problem.graphs[0]

    def linearizations(self) -> Iterator[tuple[Entry, Linearization]]:
        """Each batch with its linearization."""
        for entry, lin in self.problem.linearizations():
            assert isinstance(lin, Linearization)  # a scene is never compiled
            yield entry, lin


def pose(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Names = None,
    verify: str = "gradient",
    tensor_part: bool = False,
) -> Scene:
    """Capture, add out to the points, check and prove.

    Raises:
        BatchCouplingError: samples interact.
        PointError: a point is a parameter, a module called several times, or another name of one that is there; or out
            is several tensors, or has no name.
        DagHesseError: as :func:`dag_hesse.analyze`.
    """
    choose("verify", verify, VERIFY)
    model = unwrapped(model)
    batches = Batches(batch, None, model, loss)
    chosen = partial(_with_out, model=model, points=points)
    graphs = capture_all(model, batches, loss=loss, output=output, points=chosen)
    needs_split(graphs)
    for graph in graphs:
        _check(graph)
    prove_all(graphs, batches, model, loss, output, verify)
    like = partial(points_like, graphs[0], model)
    problem = Problem(
        model,
        fuse_all(graphs),
        batches,
        "per_sample",
        reduction=find_reduction(model, graphs, batches, loss, None, per_sample=True),
        tensor_part=tensor_part,
        again=partial(capture_anew, model, loss=loss, output=output, points=like, space="activation", verify=verify),
        loss=loss,
    )
    problem.settled()
    return Scene(problem)


def _with_out(graph: CurvatureGraph, *, model: nn.Module, points: Names) -> tuple[Point, ...]:
    """The points asked for, and out if it is not among them."""
    own = default_points(graph, model) if points is None else resolve_points(graph, model, points)
    if len(graph.out) != 1:
        raise PointError(
            f"the loss is a function of {len(graph.out)} tensors, and Jacobians are taken to one: name it with output=."
        )
    if any(graph.out[0] in point.sites for point in own):
        return own
    names = [name for name, sites in graph.taps.items() if sites == graph.out]
    if not names:
        raise PointError(
            "what the loss is a function of has no name: tap() it in the forward, and name it with output=."
        )
    out = "output" if "output" in names else names[0]
    return resolve_points(graph, model, [*(point.name for point in own), out])


def _check(graph: CurvatureGraph) -> None:
    owners: dict[int, str] = {}
    for point in graph.points:
        if point.kind != "activation":
            raise PointError(f"point '{point.name}' is a parameter; Jacobians are taken between activations.")
        if len(point.sites) > 1:
            raise PointError(
                f"'{point.name}' is called {len(point.sites)} times, so its Jacobian is not one matrix: name single "
                f"calls, '{point.name}[0]' …"
            )
        site = point.sites[0]
        if site in owners:
            raise PointError(f"'{owners[site]}' and '{point.name}' are the same tensor: leave one out.")
        owners[site] = point.name
        if graph.batch_axes[site] is None:
            raise PointError(f"point '{point.name}' has no batch axis, so it has no Jacobian per sample: leave it out.")
    if not graph.separable:
        where = analyze_structure(graph).coupled or "the loss"
        raise BatchCouplingError(
            f"Jacobians per sample need independent samples, but they interact at {where}: put BatchNorm into eval "
            "mode."
        )
    if graph.points[-1].sites != graph.out:
        raise PointError(f"point '{graph.points[-1].name}' lies behind what the loss is a function of: leave it out.")


def position_of(scene: Scene, name: str | int) -> int:
    """Place of a point by name or place; out can be called ``"out"``."""
    return position(
        -1 if isinstance(name, str) and name == "out" and "out" not in scene.names else name, scene.names, "the points"
    )


def check_report(report: Any) -> None:
    """Raise :class:`OptionError` for what is no report."""
    if not isinstance(report, CurvatureReport):
        raise OptionError(f"report is {kind_of(report)}; expected one of analyze() or load().")


def fraction(option: str, value: Any) -> float:
    """A number between 0 and 1.

    Raises:
        OptionError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise OptionError(f"{option}={value!r}; expected a number between 0 and 1.")
    return float(value)
