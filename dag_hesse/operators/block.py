"""Rectangular blocks of an operator, and its symmetric submatrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import scipy.sparse.linalg
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from dag_hesse.budget import Budget
from dag_hesse.errors import OptionError
from dag_hesse.kernels.arena import Arena
from dag_hesse.operators import eigen, traces
from dag_hesse.operators.base import SymmetricOperator
from dag_hesse.operators.exports import dense, to_scipy
from dag_hesse.operators.vectors import OverForm, to_numpy
from dag_hesse.options import checked_options
from dag_hesse.ranks import Ranks, agree


@final
class Submatrix(SymmetricOperator):
    """The rows and columns of some segments: swept from there and read there."""

    def __init__(self, parent: SymmetricOperator, places: Sequence[int]) -> None:
        self.parent, self.places, self.form = parent, tuple(places), parent.form.among(places)

    @property
    def chunk(self) -> int:
        """As that of the operator."""
        return self.parent.chunk

    @property
    def _together(self) -> Ranks | None:
        return self.parent._together

    @property
    def _budget(self) -> Budget:
        return self.parent._budget

    @property
    def _arena(self) -> Arena:
        return self.parent._arena

    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        return self.parent._between(segments, self.places, self.places)

    def _between(self, segments: list[Tensor], rows: Sequence[int], columns: Sequence[int]) -> list[Tensor]:
        where = ([self.places[k] for k in some] for some in (rows, columns))
        return self.parent._between(segments, *where)


@final
class Block(OverForm):
    """The block [v, w] of an operator, (d_v, d_w): one segment on either side, or several."""

    def __init__(self, parent: SymmetricOperator, rows: Sequence[int], columns: Sequence[int]) -> None:
        self.parent, self.rows, self.columns = parent, tuple(rows), tuple(columns)
        self.form = parent.form.among(columns)  # of what it is multiplied with
        self._out = parent.form.among(rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_v, d_w)."""
        return self._out.size, self.form.size

    @property
    def chunk(self) -> int:
        """How many vectors profit from being multiplied together."""
        return self.parent.chunk

    @property
    def _budget(self) -> Budget:
        return self.parent._budget

    @property
    def _together(self) -> Ranks | None:
        return self.parent._together

    @property
    def T(self) -> Block:
        """The block [w, v]."""
        return Block(self.parent, self.columns, self.rows)

    def __repr__(self) -> str:
        sides = (", ".join(names[:3]) + (", …" if len(names) > 3 else "") for names in (self._out.names, self.names))
        return f"Block([{' | '.join(sides)}], {self.shape[0]} × {self.shape[1]}, {self.dtype})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the segments that it is multiplied with."""
        return self.form.names

    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        return self.parent._between(segments, self.rows, self.columns)

    def __matmul__(self, z: Any) -> Any:
        """The product (d_v,) or (d_v, k) with z (d_w,) or (d_w, k); of an array, an array; of a dict, a dict.

        Raises:
            VectorError: it does not fit.
        """
        segments, _ = self.form.pack(z, self.parent._arena)
        found = self._products(segments)
        if isinstance(z, (Tensor, np.ndarray)):
            joined = torch.cat(found, dim=1) if len(found) > 1 else found[0]
            product = joined[0] if z.ndim == 1 else joined.T
            return to_numpy(product) if isinstance(z, np.ndarray) else product
        first = next(iter(z.values())) if isinstance(z, Mapping) else z[0]
        several = first.ndim > len(self.form.shapes[self.names.index(next(iter(z))) if isinstance(z, Mapping) else 0])
        shaped = self._out.shaped(found, several)
        return dict(zip(self._out.names, shaped, strict=True)) if isinstance(z, Mapping) else type(z)(shaped)

    def __rmatmul__(self, z: Any) -> Any:
        """``z @ block`` for (d_v,) or rows (k, d_v)."""
        return self.T @ z if getattr(z, "ndim", 1) == 1 else (self.T @ z.T).T

    __array_ufunc__ = None

    def dense(self) -> Tensor:
        """The matrix (d_v, d_w), by identity probes.

        Raises:
            MemoryBudgetError: it would not fit.
        """
        return dense(self)

    def to_scipy(self) -> LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` over NumPy arrays."""
        return to_scipy(self)

    @checked_options()
    def trace(
        self, matvecs: int | None = None, seed: int = 0, return_stderr: bool = False, method: str = "hutchinson"
    ) -> Any:
        """The trace of a square block; arguments and errors as for :meth:`dag_hesse.HessianOperator.trace`.

        Raises:
            OptionError: the block is not square.
        """
        if self.form.sizes != self._out.sizes:
            raise OptionError(f"{self!r} has no trace: it is {self.shape[0]} × {self.shape[1]}, not square.")
        agree(self.parent._together, "trace()", matvecs=matvecs, seed=seed, method=method)
        return traces.trace(self, matvecs, seed, return_stderr, method)

    @checked_options(eigen.eigsh, scipy.sparse.linalg.eigsh)
    def eigsh(self, k: int = 6, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`dag_hesse.HessianOperator.eigsh`, of a block [v, v].

        Raises:
            OptionError: the block is not a diagonal one, so it is not symmetric.
        """
        if self.rows != self.columns:
            raise OptionError(
                f"{self!r} is not symmetric: eigenvalues are those of a block [v, v]; take "
                "scipy.sparse.linalg.svds(block.to_scipy()) for singular values."
            )
        agree(self.parent._together, "eigsh()", k=k, **options)
        return eigen.eigsh(Submatrix(self.parent, self.rows), k, **options)
