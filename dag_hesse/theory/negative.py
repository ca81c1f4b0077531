"""Negative curvature: how much there is, along which directions, and which part of H it comes from (App. H.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor, nn

from dag_hesse._capture.losses import Loss
from dag_hesse.errors import OptionError, integer
from dag_hesse.operators import HessianOperator
from dag_hesse.operators.eigen import BESIDE, of_unit_size
from dag_hesse.theory.text import table

Array = NDArray[np.float64]
_DENSE = 1024  # rows of H up to which all eigenvalues are found
_VECTORS = 20  # of Lanczos, at least
_ROUNDINGS = 100  # of ‖H‖_F, that may be left of an eigenvalue that is 0


@dataclass(frozen=True)
class NegativeCurvature:
    """The most negative eigenvalues of H and their directions, k of them or fewer.

    Attributes:
        names, shapes: segments of a direction: parameters, or activations without their batch axis.
        mass: m₋ = Σ|λ_i| over the negative eigenvalues (Definition 82); a lower bound unless ``complete``.
        complete: whether all negative eigenvalues were found.
        values: eigenvalues below 0, ascending, (k,).
        directions: unit eigenvectors e as rows, (k, n), signed so that the loss falls: ∇Lᵀe ≤ 0.
        residual: ‖H e − λ e‖₂, (k,).
        slope: ∇Lᵀe, (k,).
        gn_part, tensor_part: eᵀH_GN e and eᵀH_T e, (k,); they add up to the eigenvalues.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    mass: float
    complete: bool
    values: Array
    directions: Tensor = field(repr=False)
    residual: Array
    slope: Array
    gn_part: Array
    tensor_part: Array

    def direction(self, number: int = 0) -> dict[str, Tensor]:
        """One direction by segment, each in its own shape.

        Raises:
            OptionError: there is no such direction.
        """
        if integer("number", number, 0) >= len(self.values):
            raise OptionError(f"direction {number} of {len(self.values)}: H has no more negative eigenvalues here.")
        pieces = self.directions[number].split([int(np.prod(shape)) for shape in self.shapes])
        return {n: x.reshape(shape) for n, x, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def predicted(self, step: float, number: int = 0) -> float:
        """Change of the loss along a direction to second order, step·∇Lᵀe + step² λ/2."""
        return float(step * self.slope[number] + 0.5 * step**2 * self.values[number])

    def __str__(self) -> str:
        columns = self.values, self.residual, self.slope, self.gn_part, self.tensor_part
        rows = [(str(k), *row) for k, row in enumerate(zip(*(c.tolist() for c in columns), strict=True))]
        head = f"m₋ {'=' if self.complete else '≥'} {self.mass:.3g}"
        return f"{head}\n{table(['', 'λ', '‖He − λe‖', '∇Lᵀe', 'eᵀH_GN e', 'eᵀH_T e'], rows)}" if rows else head


def negative_curvature(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Sequence[str] | str | None = None,
    space: str = "parameter",
    k: int = 3,
    seed: int = 0,
) -> NegativeCurvature:
    """Find the most negative curvature of the loss, with directions along which it falls (paper, App. H.2).

    For a loss that is convex in out, H_GN is positive semidefinite, so all negative curvature is of H_T (Theorem 83):
    eᵀH_T e ≤ λ. Other losses may have negative curvature in H_GN. Proposition 85 promises a decrease along ±e, which
    holds where ∇L = 0; elsewhere one of the two signs may lead uphill, so the sign is taken from the gradient
    (Corollary 86).

    Args:
        model, batch, loss, output: as for :class:`dag_hesse.HessianOperator`.
        points, space: parameters (all by default), or activations, which one perturbation moves for all samples.
        k: most eigenpairs wanted.
        seed: of the iteration's start, which runs where H has more than 1024 rows.

    Returns:
        :class:`NegativeCurvature`, in units of the loss per squared unit of the parameters.

    Raises:
        OptionError: ``k`` is less than 1.
        MemoryBudgetError: the vectors of the iteration do not fit into memory.
        CaptureError: H does not part into H_GN and H_T.
        DagHesseError: as :class:`dag_hesse.HessianOperator`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)).double()
        >>> for p in net.parameters():
        ...     _ = p.data.zero_()
        >>> one = torch.ones(1, 1).double()
        >>> found = dh.theory.negative_curvature(net, (one, one))  # of (1 − uv)² at 0
        >>> found.values, found.mass
        (array([-2.]), 2.0)
    """
    k, seed = integer("k", k, 1), integer("seed", seed)
    hessian = HessianOperator(model, batch, loss=loss, output=output, points=points, space=space)
    values, vectors, mass, complete = _lowest(hessian, k, seed)
    columns = torch.from_numpy(vectors).to(dtype=hessian.dtype, device=hessian.device)
    gn, tensor = (part.double() for part in (hessian.parts(columns) if columns.numel() else (columns, columns)))
    columns, slope = columns.double(), hessian.gradient.double() @ columns.double()
    signs = torch.where(slope > 0, -1.0, 1.0).double()
    left = gn + tensor - columns * torch.from_numpy(values).to(columns)
    return NegativeCurvature(
        hessian.form.names,
        tuple(map(tuple, hessian.form.shapes)),
        mass,
        complete,
        values,
        (columns * signs).T.contiguous(),
        _numpy(left.norm(dim=0)),
        _numpy(slope * signs),
        _numpy((columns * gn).sum(0)),
        _numpy((columns * tensor).sum(0)),
    )


def _numpy(x: Tensor) -> Array:
    return x.cpu().numpy()


def _lowest(hessian: HessianOperator, k: int, seed: int) -> tuple[Array, Array, float, bool]:
    """At most k negative eigenvalues and their vectors (n, k), m₋ of those found, and whether these are all."""
    rows, complete = hessian.shape[0], hessian.shape[0] <= _DENSE
    if complete:
        dense = hessian.dense().double().cpu().numpy()
        values, vectors = np.linalg.eigh(0.5 * (dense + dense.T))
        norm = float(np.linalg.norm(values))
    else:
        start = np.random.default_rng(seed).standard_normal(rows)
        start /= np.linalg.norm(start)
        operator, wanted = hessian.to_scipy(), min(k, rows - 1)
        ncv = min(rows, max(2 * wanted + 1, _VECTORS))
        need = (ncv + wanted + BESIDE) * rows * operator.dtype.itemsize
        hessian._check_room(need, f"a basis of {ncv} Lanczos vectors, with the directions,", "take a smaller k=")
        start = start.astype(operator.dtype)
        scale, unit = of_unit_size(operator, start)
        if not scale:  # what a random vector is mapped to 0 by
            return np.zeros(0), np.zeros((rows, 0)), 0.0, True
        try:
            values, vectors = eigsh(unit, k=wanted, which="SA", v0=start, ncv=ncv)
        except ArpackNoConvergence as error:  # those that it has are good
            values, vectors = error.eigenvalues, error.eigenvectors
        order = np.argsort(values)
        values, vectors = values[order].astype(float) * scale, vectors[:, order].astype(float)
        norm = scale * rows**0.5  # of a random direction's image: its mean square is ‖H‖²_F / n
    floor = _ROUNDINGS * torch.finfo(hessian.dtype).eps * norm
    negative = values < -floor
    mass = float(np.abs(values[negative]).sum())
    every = complete or bool((~negative).any())  # the next one up was found, and it is not negative
    return values[negative][:k], vectors[:, negative][:, :k], mass, every
