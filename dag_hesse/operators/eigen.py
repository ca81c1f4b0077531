"""Eigenvalues by SciPy's Lanczos method, with the options that take fewest products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse.linalg
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence
from torch import Tensor

from dag_hesse.errors import ConvergenceError, OptionError, choose, integer
from dag_hesse.operators.estimates import checked_count
from dag_hesse.operators.vectors import to_numpy

if TYPE_CHECKING:
    from dag_hesse.operators.core import SegmentedOperator

# Lanczos vectors kept for one eigenvalue of a small CNN: with SciPy's 20 it takes 21 products, with 8 it takes 13 for a
# residual of 1e-3 λ (in fact 6e-6, λ to seven digits) and 9 for 1e-2 (λ to five); below 5, restarts cost more.
_LEAST_VECTORS = 8


class Eigenpair(NamedTuple):
    """An eigenvalue of an operator.

    Attributes:
        value: λ.
        vector: its eigenvector of length one, as a dict by name in the parameters' (or points') shapes.
        residual: ‖H v − λ v‖, which bounds how far λ is from an eigenvalue.
    """

    value: float
    vector: dict[str, Tensor]
    residual: float


def eigsh(
    operator: SegmentedOperator,
    k: int = 6,
    *,
    seed: int = 0,
    tol: float = 1e-3,
    ncv: int | None = None,
    v0: Any = None,
    which: str = "LM",
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """As :meth:`dag_hesse.HessianOperator.eigsh`."""
    k, size = checked_count("k", k, operator.shape[0], least=1), operator.shape[0]
    if not (isinstance(tol, (int, float)) and 0 <= tol < 1):
        raise OptionError(f"tol={tol!r}; expected a relative accuracy from 0 (machine precision) to 1.")
    if v0 is None:
        v0 = np.random.default_rng(integer("seed", seed)).standard_normal(size)
    v0 = to_numpy(v0.detach()) if isinstance(v0, Tensor) else v0
    ncv = min(size, max(2 * k + 2, _LEAST_VECTORS)) if ncv is None else checked_count("ncv", ncv, size + 1)
    choose("which", which, ("LM", "SM", "LA", "SA", "BE"))
    given = operator.to_scipy()
    try:
        found: tuple[np.ndarray, np.ndarray] = scipy.sparse.linalg.eigsh(
            given, k=k, tol=tol, ncv=ncv, v0=v0, which=which, **options
        )
    except ArpackNoConvergence as error:
        raise ConvergenceError(
            f"{len(error.eigenvalues)} of {k} eigenvalues have converged to tol={tol:g}: allow more products by "
            "maxiter= or ncv=, or a larger tol=."
        ) from error
    except ArpackError:
        if np.any(given @ np.asarray(v0, dtype=given.dtype)):
            raise
        return np.zeros(k, given.dtype), np.eye(size, k, dtype=given.dtype)  # what a random vector is mapped to 0 by
    return found


def top_eigenvectors(operator: SegmentedOperator, k: int, **options: Any) -> list[Eigenpair]:
    """As :meth:`dag_hesse.HessianOperator.top_eigenvectors`."""
    values, vectors = eigsh(operator, k, **options)
    order = np.argsort(-np.abs(values))
    values = values[order]
    columns = torch.from_numpy(np.ascontiguousarray(vectors[:, order])).to(operator.dtype).to(operator.device)
    images = operator @ columns
    found = []
    for number, value in enumerate(values.tolist()):
        column = columns[:, number]
        off = float((images[:, number] - value * column).double().norm())
        found.append(Eigenpair(value, operator.by_name(column), off))
    return found
