"""(H + λI) x = b by SciPy's Krylov methods, with the residual that is left."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg, minres
from torch import Tensor

from dag_hesse.errors import OptionError, choose, integer
from dag_hesse.operators.eigen import of_unit_size
from dag_hesse.operators.vectors import to_numpy

if TYPE_CHECKING:
    from dag_hesse.operators.core import SegmentedOperator

METHODS = {"minres": minres, "cg": cg}
_ROUNDS = 6


class Solution(NamedTuple):
    """Of (H + λI) x = b.

    Attributes:
        x: in the form of b.
        residual: ‖b − (H + λI) x‖ / ‖b‖, the largest of the columns.
        method: ``"minres"``, ``"cg"``, or ``"cholesky"`` (stored blocks alone).
        iterations: in all columns; 0 for Cholesky.
    """

    x: Any
    residual: float
    method: str
    iterations: int


def checked_damping(damping: Any) -> float:
    """λ as Python's float.

    Raises:
        OptionError: it is no number from 0 on.
    """
    if not isinstance(damping, Real) or isinstance(damping, bool) or not 0 <= float(damping) < float("inf"):
        raise OptionError(f"damping={damping!r}; expected a number from 0 on.")
    return float(damping)


def solved(
    operator: SegmentedOperator,
    b: Any,
    damping: float = 0.0,
    preconditioner: Any = None,
    method: str = "minres",
    rtol: float = 1e-6,
    maxiter: int | None = None,
) -> Solution:
    """As :meth:`dag_hesse.HessianOperator.solve`."""
    shift = checked_damping(damping)
    choose("method", method, METHODS)
    if not (isinstance(rtol, Real) and 0 < float(rtol) < 1):
        raise OptionError(f"rtol={rtol!r}; expected a relative residual between 0 and 1.")
    if maxiter is not None:
        integer("maxiter", maxiter, 1)
    segments, unpack = operator.form.pack(b)
    inverse = None if preconditioner is None else _as_scipy(operator, preconditioner)
    x, steps = by_krylov(operator, segments, shift, rtol, maxiter, method, inverse)
    return Solution(unpack(x), residual(operator, x, segments, shift), method, steps)


def _as_scipy(operator: SegmentedOperator, preconditioner: Any) -> LinearOperator:
    """What approximates (H + λI)⁻¹, over NumPy arrays: an operator, a tensor (n, n) or (n,), or a callable."""
    n = operator.shape[0]
    if isinstance(preconditioner, (Tensor, np.ndarray)):
        matrix = torch.as_tensor(preconditioner, dtype=operator.dtype, device=operator.device)
        if matrix.shape not in ((n,), (n, n)):
            raise OptionError(
                f"preconditioner has shape {tuple(matrix.shape)}; expected ({n},), a diagonal, or ({n}, {n})."
            )
        product: Any = (lambda v: matrix * v) if matrix.ndim == 1 else (lambda v: matrix @ v)
    elif getattr(preconditioner, "shape", (n, n)) != (n, n):
        raise OptionError(f"preconditioner is {preconditioner.shape}; expected ({n}, {n}).")
    elif isinstance(preconditioner, LinearOperator):
        return preconditioner
    elif hasattr(preconditioner, "__matmul__"):
        product = preconditioner.__matmul__
    elif callable(preconditioner):
        product = preconditioner
    else:
        raise OptionError(
            f"preconditioner is a {type(preconditioner).__name__}; expected what approximates the inverse: an "
            "operator, a tensor (n, n), its diagonal (n,), or a callable of a vector (n,)."
        )

    def run(x: np.ndarray) -> np.ndarray:
        return to_numpy(product(torch.from_numpy(x.reshape(-1)).to(dtype=operator.dtype, device=operator.device)))

    return LinearOperator((n, n), matvec=run, dtype=operator.to_scipy().dtype)


def by_krylov(
    operator: SegmentedOperator,
    segments: list[Tensor],
    shift: float,
    rtol: float,
    maxiter: int | None,
    method: str = "minres",
    inverse: LinearOperator | None = None,
) -> tuple[list[Tensor], int]:
    """Segments of x, a row after the other, and how many iterations were made."""
    plain, steps, rows = operator.to_scipy(), 0, []
    shifted = LinearOperator(plain.shape, matvec=lambda x: plain @ x + shift * x, dtype=plain.dtype)
    for row in torch.cat(segments, dim=1):
        x, taken = _refined(shifted, to_numpy(row), rtol, maxiter, METHODS[method], inverse)
        steps += taken
        rows.append(torch.from_numpy(x).to(row))
    return list(torch.stack(rows).split(operator.form.sizes, dim=1)), steps


def _refined(
    matrix: LinearOperator,
    b: np.ndarray,
    rtol: float,
    maxiter: int | None,
    run: Callable[..., Any],
    inverse: LinearOperator | None,
) -> tuple[np.ndarray, int]:
    """x and the iterations made: what a method leaves of b is solved for again, until that is small or stays.

    SciPy's MINRES compares the residual with ‖A‖ ‖x‖, and counts ‖b‖ into ‖A‖: the systems it is given have b and A of
    size one, and what it calls solved is looked at.
    """
    name = "rtol" if "rtol" in inspect.signature(run).parameters else "tol"  # SciPy renamed it
    x, rest, steps = np.zeros_like(b), b, 0
    left = float(np.linalg.norm(b.astype(np.float64)))
    wanted = rtol * left

    def count(_: Any) -> None:
        nonlocal steps
        steps += 1

    for _ in range(_ROUNDS):
        if left <= wanted or (maxiter is not None and steps >= maxiter):
            break
        direction = (rest / b.dtype.type(left)).astype(b.dtype)
        scale, unit = of_unit_size(matrix, direction)
        if not scale:
            break
        most = None if maxiter is None else maxiter - steps
        step, _ = run(unit, direction, maxiter=most, M=inverse, callback=count, **{name: min(wanted / left, 0.5)})
        moved = x + step * b.dtype.type(left / scale)
        remains = b - matrix @ moved
        now = float(np.linalg.norm(remains.astype(np.float64)))
        if not now < left:
            break
        enough, x, rest, left = now > 0.5 * left, moved, remains, now
        if enough:  # b has a part that A does not reach, or rounding is all that is left
            break
    return x, steps


def residual(operator: SegmentedOperator, x: list[Tensor], z: list[Tensor], shift: float) -> float:
    """‖z − (H + λI) x‖ / ‖z‖, the largest of the rows."""
    images = operator._products(x)
    off = torch.cat([b - y - shift * a for a, y, b in zip(x, images, z, strict=True)], dim=1).double().norm(dim=1)
    size = torch.cat(z, dim=1).double().norm(dim=1)
    return float(torch.where(size > 0, off / size.clamp_min(1e-300), off).max())
