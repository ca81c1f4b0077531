"""What every operator over named segments has: vectors in all forms, products, exports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from dag_hesse.kernels.arena import SYSTEM, Arena
from dag_hesse.operators.exports import dense, to_scipy
from dag_hesse.operators.vectors import OverForm


class SegmentedOperator(OverForm, ABC):
    """A symmetric operator over a vector's named segments, given by its products."""

    @abstractmethod
    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        """Per segment, products (k, size) of k vectors given by their segments (k, size)."""

    @property
    @abstractmethod
    def chunk(self) -> int:
        """How many vectors profit from being multiplied together."""

    def _between(self, segments: list[Tensor], rows: Sequence[int], columns: Sequence[int]) -> list[Tensor]:
        """At the segments ``rows``, products of vectors that are zero but for the given segments ``columns``."""
        count, own = len(segments[0]), dict(zip(columns, segments, strict=True))
        sizes = enumerate(self.form.sizes)
        every = [own[k] if k in own else segments[0].new_zeros(count, size) for k, size in sizes]
        found = self._products(every)
        return [found[k] for k in rows]

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
    def T(self) -> SegmentedOperator:
        """The transpose: the operator itself, for it is symmetric."""
        return self

    def __matmul__(self, v: Any) -> Any:
        segments, unpack = self.form.pack(v, self._arena)
        return unpack(self._products(segments))

    def by_name(self, v: Tensor) -> dict[str, Tensor]:
        """A flat vector (n,), or columns (n, k), as a dict of the segments in their shapes (*shape) or (*shape, k).

        Raises:
            VectorError: it does not fit.
        """
        segments, _ = self.form.pack(v)
        return dict(zip(self.names, self.form.shaped(segments, v.ndim == 2), strict=True))

    def dense(self) -> Tensor:
        """The matrix (n, n), by identity probes.

        Raises:
            MemoryBudgetError: it would not fit.
        """
        return dense(self)

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` over NumPy arrays."""
        return to_scipy(self)
