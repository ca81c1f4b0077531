"""What operators over the same vectors are put together to: multiples, sums, shifts, congruences and products."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, final

import numpy as np
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from dag_hesse.budget import Budget
from dag_hesse.errors import OptionError, VectorError
from dag_hesse.kernels.arena import Arena
from dag_hesse.operators.base import SymmetricOperator
from dag_hesse.operators.exports import dense, to_scipy
from dag_hesse.operators.vectors import OverForm, VectorForm
from dag_hesse.ranks import Ranks


def number(value: Any) -> float | None:
    """A real number of Python, NumPy or PyTorch; None for anything else."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def check_same(one: VectorForm, other: VectorForm) -> None:
    """Raise :class:`OptionError` unless both are forms of the same vectors."""
    for what in ("names", "shapes", "dtype", "device"):
        a, b = getattr(one, what), getattr(other, what)
        if a == b:
            continue
        if isinstance(a, tuple):
            differ = [(x, y) for x, y in zip(a, b, strict=False) if x != y][:1] or [(f"{len(a)} segments", len(b))]
            (a, b), what = differ[0], f"{what} of their segments"
        raise OptionError(
            f"two operators differ in the {what}: {a} and {b}; expected operators over the same vectors (the same "
            "model's, with the same params= or points=, or a submatrix H[[…]])."
        )


class OfOne(SymmetricOperator):
    """An expression of one operator ``of``, over its vectors."""

    def __init__(self, of: SymmetricOperator) -> None:
        self.of, self.form = of, of.form

    @property
    def chunk(self) -> int:
        """As that of the operator."""
        return self.of.chunk

    @property
    def _together(self) -> Ranks | None:
        return self.of._together

    @property
    def _budget(self) -> Budget:
        return self.of._budget

    @property
    def _arena(self) -> Arena:
        return self.of._arena


@final
class Scaled(OfOne):
    """A number times an operator."""

    def __init__(self, of: SymmetricOperator, factor: float) -> None:
        super().__init__(of)
        self.factor = factor

    def _between(self, segments: list[Tensor], rows: Sequence[int], columns: Sequence[int]) -> list[Tensor]:
        return [self.factor * x for x in self.of._between(segments, rows, columns)]

    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        return [self.factor * x for x in self.of._products(segments)]

    def __repr__(self) -> str:
        return f"{self.factor:g} · {self.of!r}"


@final
class Sum(SymmetricOperator):
    """The sum of two operators over the same vectors."""

    def __init__(self, one: SymmetricOperator, other: SymmetricOperator) -> None:
        check_same(one.form, other.form)
        self.one, self.other, self.form = one, other, one.form

    @property
    def chunk(self) -> int:
        """As many as both profit from."""
        return min(self.one.chunk, self.other.chunk)

    @property
    def _together(self) -> Ranks | None:
        return self.one._together or self.other._together

    @property
    def _budget(self) -> Budget:
        return min(self.one._budget, self.other._budget, key=lambda budget: budget.sweeps)

    def _between(self, segments: list[Tensor], rows: Sequence[int], columns: Sequence[int]) -> list[Tensor]:
        found = (operator._between(segments, rows, columns) for operator in (self.one, self.other))
        return [x + y for x, y in zip(*found, strict=True)]

    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        found = (operator._products(segments) for operator in (self.one, self.other))
        return [x + y for x, y in zip(*found, strict=True)]

    def __repr__(self) -> str:
        return f"{self.one!r} + {self.other!r}"


@final
class Shifted(OfOne):
    """An operator plus a multiple of the identity."""

    def __init__(self, of: SymmetricOperator, shift: float) -> None:
        super().__init__(of)
        self.shift = shift

    def _between(self, segments: list[Tensor], rows: Sequence[int], columns: Sequence[int]) -> list[Tensor]:
        own = dict(zip(columns, segments, strict=True))
        found = zip(rows, self.of._between(segments, rows, columns), strict=True)
        return [x + self.shift * own[k] if k in own else x for k, x in found]

    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        return [x + self.shift * z for x, z in zip(self.of._products(segments), segments, strict=True)]

    def __repr__(self) -> str:
        return f"{self.of!r} + {self.shift:g} · I"


@final
class Congruent(OfOne):
    """D H D for a diagonal matrix D."""

    def __init__(self, of: SymmetricOperator, d: Any) -> None:
        super().__init__(of)
        self._d, _ = self.form.pack(d)  # (1, size) per segment
        if any(len(x) != 1 for x in self._d):
            raise VectorError(f"d has {len(self._d[0])} columns; expected one vector, the diagonal of D.")

    def _between(self, segments: list[Tensor], rows: Sequence[int], columns: Sequence[int]) -> list[Tensor]:
        within = [self._d[k] * z for k, z in zip(columns, segments, strict=True)]
        found = self.of._between(within, rows, columns)
        return [self._d[k] * x for k, x in zip(rows, found, strict=True)]

    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        found = self.of._products([d * z for d, z in zip(self._d, segments, strict=True)])
        return [d * x for d, x in zip(self._d, found, strict=True)]

    def __repr__(self) -> str:
        return f"D · {self.of!r} · D"


@final
class Composition(OverForm):
    """The product of operators over the same vectors, which is not symmetric: the last acts first."""

    # NumPy leaves ``v @ (A @ B)`` to us.
    __array_ufunc__ = None

    def __init__(self, *factors: SymmetricOperator) -> None:
        for factor in factors[1:]:
            check_same(factors[0].form, factor.form)
        self.factors, self.form = factors, factors[0].form

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self.form.size, self.form.size

    @property
    def _budget(self) -> Budget:
        return min((factor._budget for factor in self.factors), key=lambda budget: budget.sweeps)

    @property
    def T(self) -> Composition:
        """The transpose: the factors in the other order."""
        return Composition(*self.factors[::-1])

    def __repr__(self) -> str:
        return " @ ".join(map(repr, self.factors))

    def __matmul__(self, v: Any) -> Any:
        """The product with a vector in any form, or with an operator.

        Raises:
            VectorError: the vector does not fit.
            OptionError: the operator is over other vectors.
        """
        if isinstance(v, (SymmetricOperator, Composition)):
            return Composition(*self.factors, *(v.factors if isinstance(v, Composition) else (v,)))
        segments, unpack = self.form.pack(v)
        for factor in reversed(self.factors):
            segments = factor._products(segments)
        return unpack(segments)

    def __rmatmul__(self, v: Any) -> Any:
        """``v @ (A @ B)`` for (n,) or rows (k, n)."""
        return self.T @ v if getattr(v, "ndim", 1) == 1 else (self.T @ v.T).T

    def dense(self) -> Tensor:
        """The matrix (n, n), by identity probes."""
        return dense(self)

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` over NumPy arrays."""
        return to_scipy(self)
