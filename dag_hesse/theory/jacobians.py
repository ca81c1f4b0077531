"""Norms of Jacobians between points, sample by sample, and finite-depth Lyapunov exponents (paper, eq. 8)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dag_hesse._capture.losses import Loss
from dag_hesse.errors import integer
from dag_hesse.ir import Point
from dag_hesse.sweep import Linearization
from dag_hesse.theory.passes import dense_jacobians, pull, push, tensor_of, vector_of
from dag_hesse.theory.point_graph import PointGraph, point_graph
from dag_hesse.theory.scene import Names, Scene, fraction, pose
from dag_hesse.theory.spectral import largest_singular_values
from dag_hesse.theory.text import cell, table

Array = NDArray[np.float64]
_DENSE = 1 << 20  # numbers of one pair's Jacobians that are formed as matrices
_STEPS = 200


@dataclass(frozen=True)
class JacobianNorms:
    """ρ(w←v) between n points, of B samples. Rows are where a path starts, columns where it ends.

    Attributes:
        names: the points in topological order; the last is out.
        norms: ‖J[w←v]‖₂ along all paths, (n, n, B); 0 where there is no path.
        edges: ‖D[w←v]‖₂ along the paths that pass no other point, (n, n, B); 0 where there is none.
        residual: relative error of σ² that the iteration may have left, (n, n, B); 0 where matrices were formed.
        growth: ‖J[w←v]‖_F/√d_v along all paths, (n, n, B): the root mean square of ‖J x‖/‖x‖ over directions x; NaN
            where no matrix was formed.
        graph: which points follow which.
    """

    names: tuple[str, ...]
    norms: Array
    edges: Array
    residual: Array
    growth: Array
    graph: PointGraph

    @property
    def maximum(self) -> Array:
        """Largest ‖J[w←v]‖₂ of a sample, (n, n)."""
        return self.norms.max(axis=2)

    @property
    def rho(self) -> float:
        """ρ: the largest norm of an edge's Jacobian, over edges and samples (Corollary 26)."""
        return float(self.edges.max(initial=0.0))

    @property
    def mean_rho(self) -> float:
        """The largest of the edges' norms averaged over samples: ρ_max of the paper's Table 2, and no bound."""
        return float(self.edges.mean(axis=2).max(initial=0.0))

    @property
    def exponents(self) -> Array:
        """λ₁ = log ‖J[w←v]‖₂ / m over the m edges of the shortest path, (n, n, B); NaN where there is none (eq. 8)."""
        return self._per_step(self.norms)

    @property
    def typical_exponents(self) -> Array:
        """log(‖J[w←v]‖_F/√d_v) / m, (n, n, B): how a typical direction grows, which is less than ‖J‖₂ does.

        The λ₁ that the paper reports in Table 2 is of this kind, and not eq. (8): see :func:`jacobian_norms`.
        """
        return self._per_step(self.growth)

    def _per_step(self, sizes: Array) -> Array:
        steps = self.graph.steps[:, :, None].astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(steps > 0, np.log(sizes) / steps, np.nan)

    def __str__(self) -> str:
        rows = []
        for v, w in self.graph.edges:
            edge = self.edges[v, w]
            rows.append((f"{self.names[v]} → {self.names[w]}", float(edge.mean()), float(edge.max())))
        whole, typical = (float(x[0, -1].mean()) for x in (self.exponents, self.typical_exponents))
        ends = f"from {self.names[0]} to {self.names[-1]}"
        return (
            f"{table(['edge', 'mean ρ', 'max ρ'], rows)}\nρ = {self.rho:.3g}; {ends}: "
            f"λ₁ = {cell(whole)}, of a typical direction {cell(typical)}"
        )


def jacobian_norms(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Names = None,
    tolerance: float = 1e-6,
    seed: int = 0,
    verify: str = "gradient",
) -> JacobianNorms:
    """Spectral norms of the Jacobians between activations, sample by sample (paper, Theorem 25 and eq. 8).

    Small Jacobians are formed and have exact norms. For large ones, Lanczos' iteration runs on JᵀJ, for all samples
    together, until ‖JᵀJ x − σ²x‖ ≤ ``tolerance`` σ², or for 200 steps; what is left is the ``residual``.

    The paper's Table 2 is not of eq. (8). On its models at initialization (width 64, 8 and 12 blocks, five seeds, 32 of
    CIFAR-10's test images), λ₁ of eq. (8) comes out as 0.22 and 0.14 for plain networks, 0.09 and 0.07 for residual
    ones; reported are −0.02, −0.03, 0.02 and 0.01. The authors' code follows fixed directions through the chain (QR of
    the product of Jacobians, the largest mean of log|R_kk| per step); Experiment 1 computes that as well, and it agrees
    with the table. :attr:`JacobianNorms.typical_exponents` gives −0.02, −0.02, 0.01 and 0.01, and
    :attr:`JacobianNorms.mean_rho` gives ρ_max of the table to 0.01. So (9) does not say that plain networks decay
    there.

    Args:
        model, batch, loss, output, points, verify: as for :func:`dag_hesse.analyze`. Out, what the loss is a function
            of, is added to the points.
        tolerance: of the iteration.
        seed: of its start.

    Returns:
        :class:`JacobianNorms`; norms have no unit.

    Raises:
        BatchCouplingError: samples interact.
        PointError: a point has no Jacobian per sample.
        DagHesseError: as :func:`dag_hesse.analyze`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).double()
        >>> _ = net[1].weight.data.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        >>> found = dh.theory.jacobian_norms(net, (torch.randn(4, 2).double(), torch.tensor([0, 1, 0, 1])), points="0")
        >>> found.names, round(found.rho, 9)
        (('0', 'output'), 3.0)
    """
    tolerance, seed = fraction("tolerance", tolerance), integer("seed", seed)
    return norms_of(pose(model, batch, loss=loss, output=output, points=points, verify=verify), tolerance, seed)


def norms_of(scene: Scene, tolerance: float = 1e-6, seed: int = 0) -> JacobianNorms:
    """As :func:`jacobian_norms`, of a posed problem."""
    graph, count = point_graph(scene.graph), len(scene.points)
    found = []
    for entry, lin in scene.linearizations():
        measured = np.zeros((4, count, count, entry.groups))  # norms, edges, residuals, growth
        _measure(lin, entry.points, entry.groups, graph, tolerance, seed, measured)
        found.append(measured)
    norms, edges, residual, growth = np.concatenate(found, axis=3)
    return JacobianNorms(scene.names, norms, edges, residual, growth, graph)


def _measure(
    lin: Linearization,
    points: tuple[Point, ...],
    samples: int,
    graph: PointGraph,
    tolerance: float,
    seed: int,
    into: Array,
) -> None:
    sites = {point.sites[0] for point in points}
    for w, target in enumerate(points):
        into[(0, 3), w, w] = 1.0
        for kind, stop, above in ((0, set[int](), graph.reaches[:, w]), (1, sites, _parents(graph, w))):
            sources = [v for v in range(len(points)) if above[v] and v != w]
            small = [v for v in sources if samples * target.dim * points[v].dim <= _DENSE]
            matrices = dense_jacobians(lin, samples, target, [points[v] for v in small], stop) if small else {}
            for v in small:
                if points[v].name not in matrices:
                    continue
                found = matrices[points[v].name]
                into[kind, v, w] = torch.linalg.matrix_norm(found, 2).cpu().numpy()
                if kind == 0:
                    into[3, v, w] = torch.linalg.matrix_norm(found).cpu().numpy() / points[v].dim ** 0.5
            for v in sources:
                if v not in small:
                    norm, left = _iterated(lin, points[v], target, samples, stop, tolerance, seed)
                    into[kind, v, w] = norm.cpu().numpy()
                    into[2, v, w] = np.maximum(into[2, v, w], left.cpu().numpy())
                    into[3, v, w] = np.nan


def _parents(graph: PointGraph, w: int) -> NDArray[np.bool_]:
    return np.array([w in below for below in graph.children])


def _iterated(
    lin: Linearization,
    source: Point,
    target: Point,
    samples: int,
    stop: Collection[int],
    tolerance: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    v, w, graph = source.sites[0], target.sites[0], lin.graph

    def forth(x: Tensor) -> Tensor:
        seeds = {v: tensor_of(graph, v, x.to(graph.nodes[v].dtype)[None])}
        found = push(lin, seeds, {w}, stop)
        return vector_of(graph, w, found[w])[0].double() if w in found else x.new_zeros(samples, target.dim)

    def back(y: Tensor) -> Tensor:
        given = {w: tensor_of(graph, w, y.to(graph.nodes[w].dtype)[None])}
        found = pull(lin, given, {v}, stop)
        return vector_of(graph, v, found[v])[0].double() if v in found else y.new_zeros(samples, source.dim)

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(samples, source.dim, generator=generator, dtype=torch.float64, device="cpu")
    return largest_singular_values(forth, back, start.to(lin.loss.device), tolerance, _STEPS)
