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

from dag_hesse.errors import NonFiniteError, OptionError, choose, integer, kind_of
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
    if not (isinstance(rtol, Real) and 0 < rtol < 1):
        raise OptionError(f"rtol={rtol!r}; expected a relative residual between 0 and 1.")
    if maxiter is not None:
        integer("maxiter", maxiter, 1)
    segments, unpack = operator.form.pack(b)
    check_finite(segments)
    inverse = None if preconditioner is None else _as_scipy(operator, preconditioner)
    x, steps = by_krylov(operator, segments, shift, rtol, maxiter, method, inverse)
    return Solution(unpack(x), residual(operator, x, segments, shift), method, steps)


def check_finite(segments: list[Tensor]) -> None:
    """Raise :class:`NonFiniteError` for a right-hand side that no x belongs to; the message counts what it holds."""
    if all(bool(x.isfinite().all()) for x in segments):
        return
    nan, infinite = (sum(int(find(x).sum()) for x in segments) for find in (torch.isnan, torch.isinf))
    counts = " and ".join(f"{count} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite")) if count)
    raise NonFiniteError(f"b holds {counts} of {sum(x.numel() for x in segments)} numbers; expected finite ones.")


def _as_scipy(operator: SegmentedOperator, preconditioner: Any) -> LinearOperator:
    """What approximates (H + λI)⁻¹, over NumPy arrays: an operator, a tensor (n, n) or (n,), or a callable.

    What it gives is looked at, as SciPy's methods take NaN and zero for convergence.
    """
    product = _product(operator, preconditioner)

    def run(x: np.ndarray) -> np.ndarray:
        x = x.reshape(-1)
        result = product(torch.from_numpy(x).to(dtype=operator.dtype, device=operator.device))
        y = _numbers(result, x.size)
        if np.isfinite(x).all():
            _check_positive(x, y)
        return y

    return LinearOperator(operator.shape, matvec=run, dtype=operator.to_scipy().dtype)


def _product(operator: SegmentedOperator, preconditioner: Any) -> Callable[[Tensor], Any]:
    """The preconditioner as a function of a tensor (n,).

    Raises:
        OptionError: it is none of the forms that it may have.
    """
    n = operator.shape[0]
    if isinstance(preconditioner, (Tensor, np.ndarray)):
        if torch.as_tensor(preconditioner).is_complex() or tuple(preconditioner.shape) not in ((n,), (n, n)):
            raise OptionError(
                f"preconditioner has shape {tuple(preconditioner.shape)} and type {preconditioner.dtype}; expected "
                f"real numbers, ({n},), a diagonal, or ({n}, {n})."
            )
        matrix = torch.as_tensor(preconditioner, dtype=operator.dtype, device=operator.device).detach()
        return (lambda v: matrix * v) if matrix.ndim == 1 else (lambda v: matrix @ v)
    matched = hasattr(preconditioner, "__matmul__") or callable(preconditioner)
    if isinstance(preconditioner, type) or not matched:
        is_class = isinstance(preconditioner, type)
        given = f"the class {preconditioner.__name__}" if is_class else kind_of(preconditioner)
        raise OptionError(
            f"preconditioner is {given}; expected what approximates the inverse: an operator, a tensor (n, n), "
            "its diagonal (n,), or a callable of a vector (n,)."
        )
    if getattr(preconditioner, "shape", (n, n)) != (n, n):
        raise OptionError(f"preconditioner is {preconditioner.shape}; expected ({n}, {n}).")
    if isinstance(preconditioner, LinearOperator):
        return lambda v: preconditioner.matvec(to_numpy(v))
    by_matrix: Callable[[Tensor], Any] = getattr(preconditioner, "__matmul__", preconditioner)
    return by_matrix


def _numbers(result: Any, size: int) -> np.ndarray:
    """What a preconditioner gave, as an array (n,).

    Raises:
        OptionError: it is no vector of the operator's size.
    """
    y = to_numpy(result.detach()) if isinstance(result, Tensor) else result
    if not isinstance(y, np.ndarray) or y.size != size or y.dtype.kind not in "fiu":
        gave = f"{kind_of(result)}{f' {tuple(y.shape)} of {y.dtype}' if isinstance(y, np.ndarray) else ''}"
        raise OptionError(f"preconditioner gives {gave} for a vector; expected a tensor of {size} real numbers.")
    return y.reshape(size)


def _check_positive(x: np.ndarray, y: np.ndarray) -> None:
    """Raise :class:`OptionError` where y = M x shows that M is not positive definite, or is not finite.

    >>> _check_positive(np.ones(2), np.array([3.0, -1.0]))
    """
    if not np.isfinite(y).all():
        raise OptionError(
            "preconditioner gives NaN or infinity for a vector of numbers; expected what approximates the inverse."
        )
    wide, image = (v.astype(np.float64) / (np.abs(v).max() or 1.0) for v in (x, y))  # whose products do not underflow
    if x.any() and not float(wide @ image) > 0:
        told = "zero" if not y.any() else "a vector v with x·v ≤ 0"
        raise OptionError(
            f"preconditioner gives {told} for a vector x, so it is not positive definite; expected what approximates "
            "the inverse of a positive definite H + λI, or None."
        )


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
        b = to_numpy(row)
        power = int(
            np.frexp(np.abs(b).max())[1]
        )  # of two: a b of size one has squares that neither vanish nor overflow
        x, taken = _refined(shifted, np.ldexp(b, -power), rtol, maxiter, METHODS[method], inverse)
        steps += taken
        rows.append(torch.from_numpy(np.ldexp(x, power)).to(row))
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
    left = torch.cat([b - y - shift * a for a, y, b in zip(x, images, z, strict=True)], dim=1).double()
    whole = torch.cat(z, dim=1).double()
    largest = whole.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)  # squares of what is divided by it neither vanish nor overflow
    off, size = (left / largest).norm(dim=1), (whole / largest).norm(dim=1)
    return float(torch.where(size > 0, off / size.clamp_min(1.0), off).max())
