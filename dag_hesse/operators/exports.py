"""The matrix of an operator or block, and its form for SciPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from dag_hesse.operators.vectors import to_numpy

_INSTEAD = "multiply with vectors instead, or take a block()"


class Product(Protocol):
    """What can be multiplied and exported: an operator or one of its blocks."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def _check_room(self, need: int, what: str, instead: str) -> None: ...

    @property
    def T(self) -> Product: ...

    def __matmul__(self, v: Any) -> Any: ...


def dense(operator: Product) -> Tensor:
    """The matrix of an operator or block, by identity probes."""
    check_dense(operator)
    found: Tensor = operator @ torch.eye(operator.shape[1], dtype=operator.dtype, device=operator.device)
    return found


def check_dense(operator: Product) -> None:
    """Raise :class:`MemoryBudgetError` where the matrix has no room, with the unit vectors and their products."""
    n, m = operator.shape
    operator._check_room(3 * n * m * operator.dtype.itemsize, f"dense() of a {n} × {m} operator", _INSTEAD)


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
