"""Eigenvalues by SciPy's Lanczos method, with the options that take fewest products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse.linalg
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator
from torch import Tensor

from dag_hesse.errors import ConvergenceError, OptionError, choose, integer
from dag_hesse.operators.estimates import checked_count
from dag_hesse.operators.vectors import to_numpy

if TYPE_CHECKING:
    from dag_hesse.operators.core import SegmentedOperator

# Lanczos vectors kept for one eigenvalue of a small CNN: with SciPy's 20 it takes 21 products, with 8 it takes 13 for a
# residual of 1e-3 λ (in fact 6e-6, λ to seven digits) and 9 for 1e-2 (λ to five); below 5, restarts cost more.
_LEAST_VECTORS = 8
_DENSE = (
    256  # rows up to which a matrix is made where nothing is said of the method: Lanczos misses multiple eigenvalues
)
BESIDE = 6  # vectors that come and go, beside a basis and what is found
_MOST_ITERATIONS = 2**31 - 1  # that ARPACK counts to


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
    given = operator.to_scipy()
    choose("which", which, ("LM", "SM", "LA", "SA", "BE"))
    if size <= _DENSE and ncv is None and v0 is None and not options:
        integer("seed", seed, 0)
        return _of_dense(given, k, which)
    start = _start(v0, integer("seed", seed, 0), size, given.dtype)
    if (maxiter := options.get("maxiter")) is not None:
        options["maxiter"] = min(integer("maxiter", maxiter, 1), _MOST_ITERATIONS)
    ncv = min(size, max(2 * k + 2, _LEAST_VECTORS)) if ncv is None else integer("ncv", ncv, 2)
    if ncv > size:
        raise OptionError(f"ncv={ncv}; expected at most as many Lanczos vectors as the operator has rows, {size}.")
    what = f"a basis of {ncv} Lanczos vectors, with the products,"
    operator._check_room((ncv + k + BESIDE) * size * given.dtype.itemsize, what, "take a smaller k= or ncv=")
    scale, unit = of_unit_size(given, start)
    if not scale:  # what a random vector is mapped to 0 by
        return np.zeros(k, given.dtype), np.eye(size, k, dtype=given.dtype)
    try:
        values, vectors = scipy.sparse.linalg.eigsh(unit, k=k, tol=tol, ncv=ncv, v0=start, which=which, **options)
    except ArpackNoConvergence as error:
        raise ConvergenceError(
            f"{len(error.eigenvalues)} of {k} eigenvalues have converged to tol={tol:g}: allow more products by "
            "maxiter= or ncv=, or a larger tol=."
        ) from error
    except ArpackError as error:
        raise ConvergenceError(
            f"ARPACK gives up ({error}): take another v0= or seed=, or more vectors by ncv=."
        ) from error
    return values * scale, vectors


def _of_dense(operator: LinearOperator, k: int, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Eigenpairs in ascending order, as SciPy gives them, from all products with unit vectors."""
    matrix = operator.matmat(np.eye(operator.shape[0], dtype=operator.dtype)).astype(np.float64)
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    places = np.arange(len(values))
    kept = {
        "LM": np.argsort(np.abs(values))[-k:],
        "SM": np.argsort(np.abs(values))[:k],
        "LA": places[-k:],
        "SA": places[:k],
        "BE": np.r_[places[: k // 2], places[len(places) - (k - k // 2) :]],
    }[which]
    kept = np.sort(kept)
    return values[kept].astype(operator.dtype), vectors[:, kept].astype(operator.dtype)


def _start(v0: Any, seed: int, size: int, dtype: Any) -> np.ndarray:
    """The first vector, of length one.

    Raises:
        OptionError: it has another shape, is zero, or not finite.
    """
    if v0 is None:
        v0 = np.random.default_rng(seed).standard_normal(size)
    given = to_numpy(v0.detach()) if isinstance(v0, Tensor) else np.asarray(v0)
    if given.shape not in ((size,), (size, 1)) or given.dtype.kind not in "fiu":
        raise OptionError(f"v0 has shape {given.shape} and dtype {given.dtype}; expected real numbers, ({size},).")
    wide = given.reshape(size).astype(np.float64)
    length = float(np.linalg.norm(wide / max(np.abs(wide).max(), 1e-300)))
    if not np.isfinite(wide).all() or not length:
        raise OptionError("v0 is zero or not finite; expected a vector that has a part along what is looked for.")
    return (wide / np.linalg.norm(wide)).astype(dtype)


def of_unit_size(operator: LinearOperator, start: np.ndarray) -> tuple[float, LinearOperator]:
    """s = ‖A v‖ at a vector of length one, and A/s: ARPACK and MINRES expect norms of about 1.

    The first product, which Krylov methods ask for again, is not made twice.
    """
    image = operator @ start
    scale = float(np.linalg.norm(image.astype(np.float64)))
    known: list[np.ndarray] = [image]

    def product(x: np.ndarray) -> np.ndarray:
        x = x.reshape(-1)
        again = known and np.allclose(x, start, rtol=0, atol=4 * np.finfo(start.dtype).eps)
        return (known.pop() if again else operator @ x) / start.dtype.type(scale)

    return scale, LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)


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
