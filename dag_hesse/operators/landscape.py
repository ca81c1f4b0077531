"""Slices of the loss along one or two directions, with what the operator says of them to second order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dag_hesse._capture.evidence import loss_at
from dag_hesse._capture.losses import Loss
from dag_hesse.errors import OptionError, integer, kind_of
from dag_hesse.figures import new_figure, save_figure
from dag_hesse.operators.algebra import number
from dag_hesse.operators.eigen import Eigenpair
from dag_hesse.randomness import preserved
from dag_hesse.ranks import together
from dag_hesse.sweep import Problem

if TYPE_CHECKING:
    from dag_hesse.operators.operator import CurvatureOperator

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Landscape:
    """The loss at θ + s·d, or at θ + s·d₁ + t·d₂.

    Attributes:
        steps: s, and t: (m,), the same along both directions.
        losses: (m,) or (m, m), s along the first axis: the model's own loss over all batches.
        predicted: the same shape: L + gᵀx + xᵀAx/2 for the step x and the operator's A.
        curvature: dᵀAd of each direction, (1,) or (2,).
        slope: gᵀd of each, (1,) or (2,).
        directions: the directions by name, in the parameters' shapes.
    """

    steps: Array
    losses: Array
    predicted: Array
    curvature: Array
    slope: Array
    directions: tuple[dict[str, Tensor], ...] = field(repr=False)

    def __str__(self) -> str:
        centre = self.losses[(len(self.steps) // 2,) * self.losses.ndim]
        lines = [f"loss {centre:.6g} in the middle, {self.losses.min():.6g} to {self.losses.max():.6g} around it"]
        pairs = zip(self.slope, self.curvature, strict=True)
        lines += [
            f"direction {k + 1}: slope {slope:.4g}, curvature {bent:.4g}" for k, (slope, bent) in enumerate(pairs)
        ]
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib Figure (extra: ``plot``), saved at ``path``: a curve with its parabola, or level lines.

        Raises:
            DependencyError: matplotlib is not installed.
            OptionError: a figure cannot be saved under that name.
        """
        figure = new_figure(figsize=(5.0, 4.0))
        axes = figure.subplots()
        if self.losses.ndim == 1:
            axes.plot(self.steps, self.losses, "o-", ms=3, lw=1.4, label="loss")
            axes.plot(self.steps, self.predicted, "--", lw=1.2, label="to second order")
            axes.set_ylabel("loss")
            axes.legend(fontsize=8)
        else:
            levels = axes.contourf(self.steps, self.steps, self.losses.T, levels=24, cmap="viridis")
            axes.contour(self.steps, self.steps, self.predicted.T, levels=8, colors="white", linewidths=0.6)
            figure.colorbar(levels, label="loss (white: levels to second order)")
            axes.set_ylabel("step along direction 2")
        axes.set_xlabel("step along direction 1")
        if path is not None:
            save_figure(figure, path)
        return figure


def landscape(operator: CurvatureOperator, directions: Any, span: Any, points: Any) -> Landscape:
    """As :meth:`dag_hesse.HessianOperator.landscape`."""
    count, wide = integer("points", points, 3, "both ends and the middle"), number(span)
    if wide is None or not wide > 0:
        raise OptionError(f"span={span!r}; expected a positive number, the largest step to either side.")
    centre, gradient = operator.loss, operator.gradient.double()  # also says what has no loss, or has changed
    if any(point.kind != "parameter" for point in operator._problem.points):
        raise OptionError("a landscape is of parameters: make the operator with space='parameter'.")
    rows = [_flat(operator, each) for each in _several(operator, directions)]
    images = [(operator @ row).double() for row in rows]
    steps = np.linspace(-wide, wide, count)
    steps[count // 2] = 0.0 if count % 2 else steps[count // 2]
    wide_rows = [row.double() for row in rows]
    slope = np.array([float(gradient @ d) for d in wide_rows])
    second = np.array([[float(d @ image) for image in images] for d in wide_rows])
    grid = np.stack(np.meshgrid(*[steps] * len(rows), indexing="ij"), axis=-1)
    predicted = centre + grid @ slope + 0.5 * np.einsum("...i,ij,...j->...", grid, second, grid)
    by_name = [_by_parameter(operator, row) for row in rows]
    problem, pose = operator._problem, operator._pose
    with together(problem.ranks, "a landscape"):
        found = [_value(problem, pose.module, pose.loss, by_name, at) for at in grid.reshape(-1, len(rows))]
    if problem.ranks is not None:  # of this rank's samples, so far
        (whole,) = problem.ranks.added([torch.tensor(found, dtype=torch.float64, device=problem.device)])
        found = whole.tolist()
    losses = np.array(found).reshape(grid.shape[:-1])
    named = tuple(operator.by_name(row) for row in rows)
    return Landscape(steps, losses, predicted, second.diagonal().copy(), slope, named)


def _several(operator: CurvatureOperator, directions: Any) -> list[Any]:
    """One or two directions, as they were given."""
    if directions is None:
        return operator.top_eigenvectors(1)
    alone = isinstance(directions, (Eigenpair, Tensor, dict, np.ndarray))
    given = [directions] if alone else directions
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) not in (1, 2):
        what = f"{len(given)} of them" if isinstance(given, Sequence) else kind_of(given)
        raise OptionError(f"directions are {what}; expected one vector or eigenpair, or a list of one or two.")
    return list(given)


def _flat(operator: CurvatureOperator, direction: Any) -> Tensor:
    """(n,), of a vector in any form or of an eigenpair.

    Raises:
        VectorError: it does not fit.
        OptionError: it is several columns.
    """
    vector = direction.vector if isinstance(direction, Eigenpair) else direction
    segments, _ = operator.form.pack(vector)
    if len(segments[0]) != 1:
        raise OptionError(f"a direction has {len(segments[0])} columns; expected one vector each.")
    return torch.cat([x[0] for x in segments])


def _by_parameter(operator: CurvatureOperator, row: Tensor) -> dict[str, Tensor]:
    """A flat vector by the model's parameters, where points are several of them joined, too."""
    problem, found = operator._problem, dict[str, Tensor]()
    names = {site: name for name, site in problem.graphs[0].parameters.items()}
    for place, segment in zip(operator._order, row.split(operator.form.sizes), strict=True):
        if place is None:
            continue
        sites = problem.points[place].sites
        nodes = [problem.graphs[0].nodes[site] for site in sites]
        for site, node, piece in zip(sites, nodes, segment.split([n.numel for n in nodes]), strict=True):
            move = piece.reshape(node.shape).to(node.dtype)
            found[names[site]] = found[names[site]] + move if names[site] in found else move
    return found


def _value(
    problem: Problem, model: nn.Module, loss: Loss | None, directions: list[dict[str, Tensor]], at: Array
) -> float:
    """The model's own loss over all batches, with the random draws of the operator."""
    moves: dict[str, Tensor] = {}
    for step, direction in zip(at.tolist(), directions, strict=True):
        for name, d in direction.items():
            moves[name] = moves[name] + step * d if name in moves else step * d
    shares = problem.reduction.shares(problem.batches.sizes)
    graphs = {entry.batch: entry.graph for entry in problem.entries}  # of the batches that count
    total = 0.0
    for place, (batch, share) in enumerate(zip(problem.batches, shares, strict=True)):
        if place not in graphs:
            continue
        graph = graphs[place]
        with preserved():
            if graph.rng_before is not None:
                graph.rng_before.restore()
            total += share * loss_at(model, batch, loss, moves, list(graph.written))
    return total
