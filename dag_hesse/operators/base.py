"""What all symmetric operators have in common: products in every form of vector, exports, trace and diagonal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Real
from typing import Any, Protocol, final

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from dag_hesse.errors import MemoryBudgetError, OptionError, integer
from dag_hesse.kernels.arena import SYSTEM, Arena
from dag_hesse.measure import available_memory
from dag_hesse.operators import estimates
from dag_hesse.operators.interop import estimate, to_curvlinops
from dag_hesse.operators.vectors import VectorForm, to_numpy


class SymmetricOperator(ABC):
    """A symmetric operator over a vector's named segments. It can be scaled: ``2 * H``, ``-H``, ``H / n``."""

    form: VectorForm

    @abstractmethod
    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        """Per segment, products (k, size) of k vectors given by their segments (k, size)."""

    @property
    @abstractmethod
    def chunk(self) -> int:
        """How many vectors profit from being multiplied together."""

    @property
    def _arena(self) -> Arena:
        """Where products are written."""
        return SYSTEM

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the segments, in the order of the flat vector."""
        return self.form.names

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self.form.size, self.form.size

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of flat vectors: the widest of the segments'."""
        return self.form.dtype

    @property
    def device(self) -> torch.device:
        """Where vectors lie."""
        return self.form.device

    @property
    def T(self) -> SymmetricOperator:
        """The transpose: the operator itself, for it is symmetric."""
        return self

    # NumPy leaves ``v @ H`` and ``2 * H`` to us.
    __array_ufunc__ = None

    def __repr__(self) -> str:
        segments = len(self.form.names)
        return f"{type(self).__name__}({self.shape[0]} × {self.shape[1]}, {segments} segments, {self.dtype})"

    def __matmul__(self, v: Any) -> Any:
        """The product with a vector; same form back, detached from autograd.

        Args:
            v: (n,), columns (n, k), a list or dict of segments; tensors, or NumPy arrays for the flat forms. A flat
                vector goes through the parameters as ``torch.nn.utils.parameters_to_vector(model.parameters())`` does.

        Raises:
            VectorError: it does not fit.
        """
        segments, unpack = self.form.pack(v, self._arena)
        return unpack(self._products(segments))

    def __rmatmul__(self, v: Any) -> Any:
        """``v @ H`` for (n,) or rows (k, n): the operator is symmetric."""
        return self @ v if getattr(v, "ndim", 1) == 1 else (self @ v.T).T

    def __mul__(self, factor: Any) -> Scaled:
        """The operator times a number.

        Raises:
            OptionError: it is no real number.
        """
        number = _number(factor)
        if number is None:
            raise OptionError(
                f"an operator is multiplied by a {type(factor).__name__}; expected a real number (use @ for vectors)."
            )
        return Scaled(self, number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Scaled:
        """The operator divided by a number.

        Raises:
            OptionError: it is no real number, or 0.
        """
        number = _number(divisor)
        if not number:
            raise OptionError(f"an operator is divided by {divisor!r}; expected a number other than 0.")
        return self * (1.0 / number)

    def __neg__(self) -> Scaled:
        return self * -1.0

    def dense(self) -> Tensor:
        """The matrix (n, n), by identity probes.

        Raises:
            MemoryBudgetError: it would not fit.
        """
        return dense(self)

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` over NumPy arrays."""
        return to_scipy(self)

    def eigsh(self, k: int = 6, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """k extreme eigenvalues and eigenvectors (n, k), by :func:`scipy.sparse.linalg.eigsh`."""
        k = estimates.checked_count("k", k, self.shape[0], least=1)
        return eigsh(self.to_scipy(), k=k, **options)

    def __reduce__(self) -> Any:
        raise OptionError(
            "an operator holds a model's graph and is not copied or pickled: make it anew from the model."
        )

    def to_curvlinops(self) -> Any:
        """A ``curvlinops`` operator, for everything in that library that takes one (its inverses, for example).

        Raises:
            DependencyError: curvlinops is not installed.
        """
        return to_curvlinops(self)

    def trace(self, matvecs: int | None = None, seed: int = 0) -> Tensor:
        """The trace (): exact by n products where n ≤ 64, else estimated by Hutchinson's method.

        Args:
            matvecs: random vectors of the estimate; None: 64.
            seed: of the vectors. The global RNG is neither read nor changed.

        Raises:
            OptionError: ``matvecs`` is no integer from 2 to n - 1.
        """
        return estimates.trace(self, matvecs, seed)

    def diagonal(self, matvecs: int | None = None, seed: int = 0) -> Tensor:
        """The diagonal (n,); arguments and errors as for :meth:`trace`."""
        return estimates.diagonal(self, matvecs, seed)

    def spectral_density(self, ncv: int = 64, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
        """(grid, density) by ``curvlinops.lanczos_approximate_spectrum`` with ``ncv`` Lanczos vectors.

        Raises:
            OptionError: ``ncv`` is no integer from 2 to n - 1.
            DependencyError: curvlinops is not installed.
        """
        ncv, seed = estimates.checked_count("ncv", ncv, self.shape[0]), integer("seed", seed)
        return estimate(self, "lanczos_approximate_spectrum", ncv, seed, **options)


def _number(value: Any) -> float | None:
    """A real number of Python, NumPy or PyTorch; None for anything else."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


@final
class Scaled(SymmetricOperator):
    """A number times an operator."""

    def __init__(self, of: SymmetricOperator, factor: float) -> None:
        self.of, self.factor, self.form = of, factor, of.form

    @property
    def chunk(self) -> int:
        """As that of the operator."""
        return self.of.chunk

    @property
    def _arena(self) -> Arena:
        return self.of._arena

    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        return [self.factor * segment for segment in self.of._products(segments)]

    def __repr__(self) -> str:
        return f"{self.factor:g} · {self.of!r}"


class Product(Protocol):
    """What can be multiplied and exported: an operator or one of its blocks."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def T(self) -> Product: ...

    def __matmul__(self, v: Any) -> Any: ...


def dense(operator: Product) -> Tensor:
    """The matrix of an operator or block, by identity probes."""
    n, m = operator.shape
    need, budget = 3 * n * m * operator.dtype.itemsize, available_memory() // 2
    if need > budget:
        raise MemoryBudgetError(
            f"dense() of a {n} × {m} operator needs {need / 2**30:.1f} GiB and {budget / 2**30:.1f} GiB may be used: "
            "multiply with vectors instead, or take a block()."
        )
    found: Tensor = operator @ torch.eye(m, dtype=operator.dtype, device=operator.device)
    return found


def to_scipy(operator: Product) -> LinearOperator:
    """An operator or block over NumPy arrays."""

    def product(of: Product) -> Callable[[np.ndarray], np.ndarray]:
        def run(x: np.ndarray) -> np.ndarray:
            flat = torch.from_numpy(np.ascontiguousarray(x)).to(dtype=of.dtype, device=of.device)
            return to_numpy(of @ (flat.reshape(-1) if flat.ndim == 1 else flat))

        return run

    forward, backward = product(operator), product(operator.T)
    dtype = to_numpy(torch.empty(0, dtype=operator.dtype)).dtype
    return LinearOperator(
        operator.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=dtype
    )
