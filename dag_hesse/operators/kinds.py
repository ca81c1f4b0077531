"""Hessian, Gauss–Newton and tensor part as operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from dag_hesse._capture import needs_split
from dag_hesse.errors import OptionError
from dag_hesse.operators.estimates import computed_in
from dag_hesse.operators.factor import Factor, factor_height, factored
from dag_hesse.operators.jacobian import check_output, jacobian_product, output_rows, transposed_product
from dag_hesse.operators.operator import CurvatureOperator
from dag_hesse.options import checked_options


@final
class HessianOperator(CurvatureOperator):
    """H = GGN + tensor part (design §2.2).

    Examples:
        >>> import torch, dag_hesse as dh
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> H = dh.HessianOperator(model, (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])))
        >>> H.shape, (H @ torch.ones(26)).shape
        ((26, 26), torch.Size([26]))
    """

    _part = "full"

    def parts(self, v: Any) -> tuple[Any, Any]:
        """(GGN · v, tensor part · v) from one sweep, in the form of ``v``."""
        needs_split(self._problem.graphs)
        segments, unpack = self.form.pack(v, self._arena)
        gn, tensor = self._apply(segments, ("gn", "tensor"), "both")
        return unpack(gn), unpack(tensor)


@final
class GGNOperator(CurvatureOperator):
    """The generalized Gauss–Newton part Jᵀ(∇²L)J."""

    _part = "gn"

    def factor(self) -> Factor:
        """A square root: ``(rows, signs)``, (r, n) and (r,), with G = rowsᵀ diag(signs) rows; r ≤ outputs of the batch.

        It takes an adjoint pass per sample and direction in which its loss is curved, and no probes. With ``K = rows @
        rows.T`` small, (G + λI)⁻¹ is exact by Woodbury's formula, and for a convex loss K has G's eigenvalues.

        Raises:
            MemoryBudgetError: it would not fit.
            OptionError: the operator's batch mode is ``"joint"`` and samples do not interact, or it has several ranks.
            StaleError: something changed since the operator was made.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> G = dh.GGNOperator(torch.nn.Linear(30, 3), (torch.randn(4, 30), torch.tensor([0, 1, 2, 0])))
            >>> S = G.factor().rows
            >>> S.shape, torch.allclose(S.T @ S, G.dense(), atol=1e-5)
            (torch.Size([8, 93]), True)
        """
        if self._ranks is not None:
            raise OptionError("an operator of several ranks has no factor: its rows lie on all of them.")
        self._check()
        return factored(self._problem, self._order, self.form, self._budget)

    def jvp(self, v: Any) -> Tensor:
        """J v: how the model's output changes along v, sample by sample; J is its Jacobian, and G = Jᵀ(∇²L)J.

        Args:
            v: in any form of a vector; of columns (n, k), k at once.

        Returns:
            A tensor like the output, (*out), or (*out, k); a loader's batches one behind the other.

        Raises:
            VectorError: ``v`` does not fit.
            OptionError: the loss consumes several tensors, or the operator is joint, compiled, or of several ranks.
            StaleError: something changed since the operator was made.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> G = dh.GGNOperator(torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.tensor([0, 1, 1, 0])))
            >>> G.jvp(torch.ones(8)).shape, G.vjp(torch.ones(4, 2)).shape
            (torch.Size([4, 2]), torch.Size([8]))
        """
        self._check()
        check_output(self._problem)
        segments, _ = self.form.pack(v)
        found = jacobian_product(self._problem, self._order, segments)
        first = next(iter(v.values())) if isinstance(v, Mapping) else v if hasattr(v, "ndim") else v[0]
        several = first.ndim > (1 if hasattr(v, "ndim") else len(self.form.shapes[0]))
        return found.movedim(0, -1) if several else found[0]

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀ u, (n,) for u like the output, or (n, k) for (*out, k); errors as for :meth:`jvp`.

        With u zero but for one sample it is that sample's Jacobian product.
        """
        self._check()
        check_output(self._problem)
        rows, several = output_rows(self._problem, u)
        found = transposed_product(self._problem, self._order, self.form, rows)
        return found.T if several else found[0]

    def _known_diagonal(self) -> Tensor | None:
        height, size = factor_height(self._problem), self.form.size
        fits = height * size * self.form.dtype.itemsize <= self._budget.sweeps
        if self._ranks is not None or self._problem.groups > 1 or height >= size or not fits:
            return None
        factor = self.factor()
        rows, signs = (x.to(computed_in(self.dtype)) for x in factor)
        return (signs[:, None] * rows.square()).sum(0)


@final
class TensorOperator(CurvatureOperator):
    """What Gauss–Newton leaves out of the Hessian."""

    _part = "tensor"


@checked_options(CurvatureOperator.__init__)
def hvp(model: Any, batch: Any, v: Any, **options: Any) -> Any:
    """One Hessian-vector product; options as for :class:`HessianOperator`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> model = torch.nn.Linear(3, 1)
        >>> dh.hvp(model, (torch.ones(2, 3), torch.zeros(2, 1)), torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([2., 2., 2., 2.])
    """
    return HessianOperator(model, batch, **options) @ v
