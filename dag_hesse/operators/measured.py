"""What is asked of an operator beside products: spectra, trace and diagonal, and solutions of linear systems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse.linalg
from torch import Tensor

from dag_hesse.errors import integer
from dag_hesse.operators import eigen, estimates, lanczos, solve, traces
from dag_hesse.operators.core import SegmentedOperator
from dag_hesse.operators.interop import to_curvlinops
from dag_hesse.options import checked_options
from dag_hesse.ranks import agree

if TYPE_CHECKING:
    from dag_hesse.operators.eigen import Eigenpair
    from dag_hesse.operators.solve import Solution


class MeasuredOperator(SegmentedOperator):
    """Estimates choose vectors; products are the operator's."""

    @checked_options(eigen.eigsh, scipy.sparse.linalg.eigsh)
    def eigsh(self, k: int = 6, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """k eigenvalues (k,) and eigenvectors (n, k), ascending, by :func:`scipy.sparse.linalg.eigsh`.

        Up to 256 rows, and where no option but ``which`` and ``tol`` is given, they are those of the dense matrix.
        Lanczos' method, which larger ones are left to, may find a multiple eigenvalue fewer times than it is there.

        Args:
            k: how many; those largest in magnitude, or as ``which=`` says (``"LA"``, ``"SA"``, ``"BE"``).
            options: ``tol``, the relative residual ‖Hv − λv‖ / |λ| at which it stops (1e-3; 0: machine precision). Some
                eigenvalue lies within its square or so; with 1e-2 that was once the second one, as a larger one had
                hardly been started from. ``seed`` of the vector that it starts from, so results are the same twice;
                ``ncv``, Lanczos vectors that are kept; others are SciPy's.

        Raises:
            OptionError: ``k``, ``tol``, ``ncv``, ``which`` or ``seed`` is none of these.
            MemoryBudgetError: so many vectors do not fit into memory.
            ConvergenceError: they did not converge within SciPy's ``maxiter``.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> H = dh.HessianOperator(torch.nn.Linear(9, 1), (torch.ones(2, 9), torch.zeros(2, 1)))
            >>> H.eigsh(1)[0].round(3).tolist()
            [20.0]
        """
        agree(self._together, "eigsh()", k=k, **options)
        return eigen.eigsh(self, k, **options)

    @checked_options(eigen.eigsh, scipy.sparse.linalg.eigsh)
    def top_eigenvectors(self, k: int = 1, **options: Any) -> list[Eigenpair]:
        """k eigenpairs, the largest in magnitude first, with eigenvectors as dicts by name; options as for ``eigsh``.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> H = dh.HessianOperator(torch.nn.Linear(9, 1), (torch.ones(2, 9), torch.zeros(2, 1)))
            >>> (top,) = H.top_eigenvectors()
            >>> round(top.value, 3), top.vector["weight"].shape, top.residual < 1e-2
            (20.0, torch.Size([1, 9]), True)
        """
        agree(self._together, "top_eigenvectors()", k=k, **options)
        return eigen.top_eigenvectors(self, k, **options)

    @checked_options()
    def trace(
        self, matvecs: int | None = None, seed: int = 0, return_stderr: bool = False, method: str = "hutchinson"
    ) -> Any:
        """The trace (): exact by n products where n ≤ 64, else estimated.

        Args:
            matvecs: products of the estimate; None: 64.
            seed: of the random signs. The global RNG is neither read nor changed.
            return_stderr: whether to return ``(value, stderr)``, the standard error being 0 where it is exact.
            method: ``"hutchinson"``: random signs alone. ``"hutch++"`` and ``"xtrace"`` find part of the range by a
                sketch first, where they are exact: much better where few eigenvalues are large, as the Gauss–Newton
                matrix's are, for memory of some ``matvecs`` vectors. XTrace's standard error is an upper one, up to
                three times what it is off by. ``"exact"``: n products, or a factor
                (:meth:`dag_hesse.GGNOperator.factor`) where that is smaller; no matrix.

        Returns:
            A tensor of the operator's type, but float32 where that is float16 or bfloat16.

        Raises:
            OptionError: ``matvecs`` is no integer from 2 (12 with a sketch) to n - 1, or the method is none of these.
            MemoryBudgetError: a sketch would not fit.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> H = dh.HessianOperator(torch.nn.Linear(99, 1), (torch.ones(2, 99), torch.zeros(2, 1)))
            >>> value, stderr = H.trace(return_stderr=True)
            >>> bool(abs(value - 200) < 4 * stderr), round(float(H.trace(12, method="xtrace")), 2)
            (True, 200.0)
        """
        agree(self._together, "trace()", matvecs=matvecs, seed=seed, method=method)
        if method == "exact" and matvecs is None and (known := self._known_diagonal()) is not None:
            return estimates.answered(known.sum(), return_stderr)
        return traces.trace(self, matvecs, seed, return_stderr, method)

    @checked_options()
    def diagonal(
        self, matvecs: int | None = None, seed: int = 0, return_stderr: bool = False, method: str = "hutchinson"
    ) -> Any:
        """The diagonal (n,); arguments and errors as for :meth:`trace`, standard errors (n,).

        ``method`` is ``"hutchinson"``, ``"xdiag"`` (with a sketch, as ``"xtrace"``) or ``"exact"``.
        """
        agree(self._together, "diagonal()", matvecs=matvecs, seed=seed, method=method)
        if method == "exact" and matvecs is None and (known := self._known_diagonal()) is not None:
            return estimates.answered(known, return_stderr)
        return traces.diagonal(self, matvecs, seed, return_stderr, method)

    def _known_diagonal(self) -> Tensor | None:
        """The exact diagonal, where there is a cheaper way to it than n products."""
        return None

    @checked_options(lanczos.spectral_density)
    def spectral_density(self, ncv: int | None = None, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
        """(grid, density), the density of eigenvalues p(λ), by stochastic Lanczos quadrature (Papyan, 2020).

        It takes ``ncv`` products with ``num_repeats`` vectors at a time, and none for its bounds.

        Args:
            ncv: Lanczos vectors, from 2 to n - 1; None: 64, or n - 1 where that is less.
            seed: of the vectors that it starts from.
            options: ``num_points`` (1024) of the grid; ``num_repeats`` (1), starts that are averaged and multiplied
                together; ``kappa`` (3.0) and ``margin`` (0.05), Papyan's; ``boundaries``, (lowest, highest) eigenvalue.

        Raises:
            OptionError: ``ncv`` or an option is none of these.
            MemoryBudgetError: so many vectors do not fit into memory.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> H = dh.HessianOperator(torch.nn.Linear(99, 1), (torch.randn(50, 99), torch.zeros(50, 1)))
            >>> grid, density = H.spectral_density(20)
            >>> bool(abs(torch.trapezoid(density, grid) - 1) < 0.05)
            True
        """
        agree(self._together, "spectral_density()", ncv=ncv, seed=seed, **options)
        n, seed = self.shape[0], integer("seed", seed)
        ncv = estimates.checked_count("ncv", min(64, n - 1) if ncv is None else ncv, n)
        return lanczos.spectral_density(self, ncv, seed, **options)

    @checked_options(solve.solved)
    def solve(self, b: Any, damping: float = 0.0, **options: Any) -> Solution:
        """x with (H + λI) x = b, for λ = ``damping`` and b in any form of a vector.

        Args:
            b: (n,), columns (n, k), a list or a dict.
            damping: λ ≥ 0.
            options: ``method``: ``"minres"`` (default, for any symmetric operator) or ``"cg"`` (where H + λI is
                positive definite); ``preconditioner``: what approximates (H + λI)⁻¹ and is positive definite: an
                operator, a tensor (n, n) or its diagonal (n,), or a callable of a vector (n,); ``rtol`` (1e-6) and
                ``maxiter``.

        Returns:
            ``(x, residual, method, iterations)``; ``residual`` is ‖b − (H + λI) x‖ / ‖b‖, the largest of the columns,
            by one more product: it says whether the method got there.

        Raises:
            OptionError: an option is none of these, or the preconditioner shows not to be positive definite.
            VectorError: ``b`` does not fit.
            NonFiniteError: ``b`` holds NaN or infinity.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> G = dh.GGNOperator(torch.nn.Linear(3, 1), (torch.ones(2, 3), torch.ones(2, 1)))
            >>> step = G.solve(G.gradient, damping=0.1, method="cg")
            >>> step.x.shape, step.residual < 1e-5
            (torch.Size([4]), True)
        """
        agree(self._together, "solve()", b=b, damping=damping, **options)
        return solve.solved(self, b, damping, **options)

    def to_curvlinops(self) -> Any:
        """A ``curvlinops`` operator, for everything in that library that takes one (its inverses, for example).

        Raises:
            DependencyError: curvlinops is not installed.
        """
        return to_curvlinops(self)
