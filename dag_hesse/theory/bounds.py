"""The paper's bounds on resonance (Theorem 25; Corollary 26 and Theorem 77): whether they hold, and the slack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dag_hesse._capture.losses import Loss
from dag_hesse.theory.jacobians import Array, JacobianNorms, norms_of
from dag_hesse.theory.norms import block_norms
from dag_hesse.theory.scene import Names, pose
from dag_hesse.theory.text import table


@dataclass(frozen=True)
class Bound:
    """One bound on n×n blocks of B samples.

    Attributes:
        name: the statement.
        measured: what is bounded, (n, n, B).
        bound: (n, n, B); NaN where the statement says nothing.
        rounding: relative error that counts as none.
    """

    name: str
    measured: Array
    bound: Array
    rounding: float

    @property
    def applies(self) -> NDArray[np.bool_]:
        """Where the statement says something, (n, n, B)."""
        return ~np.isnan(self.bound)

    @property
    def holds(self) -> NDArray[np.bool_]:
        """Where what is measured is not above the bound, (n, n, B); True where the statement says nothing."""
        floor = np.nanmax(self.measured, initial=0.0) * self.rounding
        return ~(self.measured > self.bound * (1.0 + self.rounding) + floor)

    @property
    def slack(self) -> Array:
        """Bound / measured, (n, n, B); 1 is tight, NaN where the statement says nothing or the block is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.measured > 0, self.bound / self.measured, np.nan)


@dataclass(frozen=True)
class ResonanceBounds:
    """Both bounds on one model and batch.

    Attributes:
        names: the points in topological order; the last is out.
        jacobians: the norms that go in.
        lyapunov: Theorem 25, R(v,w) ≤ ‖H[w,w]‖_F ‖J[w←v]‖₂.
        global_rate: Corollary 26 and Theorem 77, R_GN(v,w) ≤ ‖∇²L‖_F (sρ)^dist(v,w).
        rate: sρ of every sample, (B,): the largest out-degree of the point graph times the largest norm of an edge.
    """

    names: tuple[str, ...]
    jacobians: JacobianNorms
    lyapunov: Bound
    global_rate: Bound
    rate: Array

    def __str__(self) -> str:
        rows = []
        for v, w in zip(*np.triu_indices(len(self.names)), strict=True):
            cells: list[object] = [f"{self.names[v]}, {self.names[w]}"]
            for bound in (self.lyapunov, self.global_rate):
                some = bound.applies[v, w]
                slack = bound.slack[v, w][some]
                cells += [bool(bound.holds[v, w].all()) if some.any() else "-", _least(slack)]
            rows.append(cells)
        head = ["pair", "Thm 25", "slack", "Thm 77", "slack"]
        return f"sρ ≤ {self.rate.max():.3g} per sample\n{table(head, rows)}"


def _least(slack: Array) -> float:
    known = slack[~np.isnan(slack)]
    return float(known.min()) if known.size else float("nan")


def resonance_bounds(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Names = None,
    verify: str = "gradient",
) -> ResonanceBounds:
    """Hold Theorem 25 and Corollary 26/Theorem 77 of the paper against every sample's exact blocks.

    **Theorem 25.** R(v,w) ≤ ‖H[w,w]‖_F ‖J[w←v]‖₂ for a chain v → … → w without branches. The proof needs less: it is
    enough that every path from v to the loss passes w, for then H[v,w] = J[w←v]ᵀ H[w,w]. It is applied to all those
    pairs, so also across blocks with a skip connection inside.

    **Corollary 26, Theorem 77.** R_GN(v,w) ≤ ‖∇²L‖_F (sρ)^dist(v,w), where sρ < 1: s is the largest number of children
    of a point, ρ the largest norm of an edge's Jacobian, dist the shortest path that may go against edges. It is
    proved for sρ < 1 alone, and fails beyond (already R_GN(v,v) of a chain with ρ > 1 grows like ρ to twice the
    distance from v to out); there it says nothing here.

    Both are statements about one sample. For blocks averaged over a batch they hold with ‖∇²L‖_F averaged over samples,
    but not with ‖∇²L‖_F of the averaged ∇²L, which is smaller.

    Blocks are exact: this takes a sweep per dimension of every point.

    Args:
        model, batch, loss, output, points, verify: as for :func:`dag_hesse.analyze`; out is added to the points. Edges
            are between points: the more points, the finer the graph.

    Returns:
        :class:`ResonanceBounds`: norms of the blocks of every sample's own loss.

    Raises:
        BatchCouplingError: samples interact.
        PointError: a point has no Jacobian per sample.
        DagHesseError: as :func:`dag_hesse.analyze`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        >>> batch = torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 1, 1])
        >>> found = dh.theory.resonance_bounds(net, batch, points=["0", "1"])
        >>> bool(found.lyapunov.applies.any()), bool(found.lyapunov.holds.all()), bool(found.global_rate.holds.all())
        (True, True, True)
    """
    scene = pose(model, batch, loss=loss, output=output, points=points, verify=verify, tensor_part=True)
    jacobians, norms = norms_of(scene), block_norms(scene)
    graph, rounding = jacobians.graph, 1e3 * torch.finfo(scene.problem.dtype).eps
    own = np.einsum("vvb->vb", norms.full)
    lyapunov = _symmetric(np.where(graph.passes[:, :, None], own[None] * jacobians.norms, np.nan))
    rate = graph.out_degree * jacobians.edges.max(axis=(0, 1))
    distance = graph.distance[:, :, None].astype(float)
    with np.errstate(over="ignore"):
        power = norms.gn[-1, -1] * rate**distance
    global_rate = np.where((rate < 1) & (distance >= 0), power, np.nan)
    return ResonanceBounds(
        scene.names,
        jacobians,
        Bound("Theorem 25", norms.full, lyapunov, rounding),
        Bound("Theorem 77", norms.gn, global_rate, rounding),
        rate,
    )


def _symmetric(bound: Array) -> Array:
    """A bound on [v, w] is one on [w, v]."""
    return np.fmin(bound, bound.transpose(1, 0, 2))
