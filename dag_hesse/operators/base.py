"""What all symmetric operators have in common: products, expressions and parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dag_hesse.errors import OptionError, PointError, kind_of
from dag_hesse.names import selected
from dag_hesse.operators.measured import MeasuredOperator

if TYPE_CHECKING:
    from dag_hesse.operators.algebra import Congruent, Scaled, Shifted, Sum
    from dag_hesse.operators.block import Block


class SymmetricOperator(MeasuredOperator):
    """A symmetric operator over a vector's named segments.

    It goes into expressions: ``2 * H``, ``-H``, ``H / n``, ``A + B``, ``A - B``, ``H.shifted(λ)`` for H + λI,
    ``H.congruent(d)`` for D H D, and ``A @ B``, which is not symmetric. ``H["a", "b"]`` is a block, ``H[["a", "b"]]`` a
    symmetric submatrix.
    """

    # NumPy leaves ``v @ H`` and ``2 * H`` to us.
    __array_ufunc__ = None

    def __repr__(self) -> str:
        segments = len(self.form.names)
        return f"{type(self).__name__}({self.shape[0]} × {self.shape[1]}, {segments} segments, {self.dtype})"

    def __matmul__(self, v: Any) -> Any:
        """The product with a vector (same form back, detached from autograd), or with an operator.

        Args:
            v: (n,), columns (n, k), a list or dict of segments; tensors, or NumPy arrays for the flat forms. A flat
                vector goes through the parameters as ``torch.nn.utils.parameters_to_vector(model.parameters())`` does.

        Raises:
            VectorError: it does not fit.
            OptionError: the operator is over other vectors.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> G = dh.GGNOperator(torch.nn.Linear(3, 1), (torch.ones(2, 3), torch.zeros(2, 1)))
            >>> G @ torch.ones(4)
            tensor([8., 8., 8., 8.])
            >>> (G @ G).shape, (G @ G).T @ torch.ones(4)
            ((4, 4), tensor([64., 64., 64., 64.]))
        """
        from dag_hesse.operators.algebra import Composition

        if isinstance(v, SymmetricOperator):
            return Composition(self, v)
        if isinstance(v, Composition):
            return Composition(self, *v.factors)
        return super().__matmul__(v)

    def __rmatmul__(self, v: Any) -> Any:
        """``v @ H`` for (n,) or rows (k, n): the operator is symmetric."""
        return self @ v if getattr(v, "ndim", 1) == 1 else (self @ v.T).T

    def __mul__(self, factor: Any) -> Scaled:
        """The operator times a number.

        Raises:
            OptionError: it is no real number.
        """
        from dag_hesse.operators.algebra import Scaled, number

        by = number(factor)
        if by is None:
            raise OptionError(
                f"an operator is multiplied by {kind_of(factor)}; expected a real number (use @ for vectors)."
            )
        return Scaled(self, by)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Scaled:
        """The operator divided by a number.

        Raises:
            OptionError: it is no real number, or 0.
        """
        from dag_hesse.operators.algebra import number

        by = number(divisor)
        if not by:
            raise OptionError(f"an operator is divided by {divisor!r}; expected a number other than 0.")
        return self * (1.0 / by)

    def __neg__(self) -> Scaled:
        return self * -1.0

    def __add__(self, other: Any) -> Sum:
        """The sum with an operator over the same vectors.

        Raises:
            OptionError: it is none (a number is added by :meth:`shifted`).
        """
        from dag_hesse.operators.algebra import Sum

        if not isinstance(other, SymmetricOperator):
            raise OptionError(
                f"{kind_of(other)} is added to an operator; expected an operator. H.shifted(λ) is H + λI."
            )
        return Sum(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Sum:
        """The difference; errors as for a sum."""
        return self + (-other if isinstance(other, SymmetricOperator) else other)

    __rsub__ = __sub__

    def shifted(self, by: float) -> Shifted:
        """H + λI for λ = ``by``.

        Raises:
            OptionError: it is no real number.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> H = dh.HessianOperator(torch.nn.Linear(3, 1), (torch.ones(2, 3), torch.zeros(2, 1)))
            >>> H.shifted(-1) @ torch.ones(4)
            tensor([7., 7., 7., 7.])
        """
        from dag_hesse.operators.algebra import Shifted, number

        shift = number(by)
        if shift is None:
            raise OptionError(f"an operator is shifted by {by!r}; expected a real number.")
        return Shifted(self, shift)

    def congruent(self, d: Any) -> Congruent:
        """D H D for D = diag(d), d in any form of a vector: with d = p^(-1/2), its eigenvalues are those of P⁻¹H.

        Raises:
            VectorError: ``d`` does not fit, or is a matrix.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> H = dh.HessianOperator(torch.nn.Linear(3, 1), (torch.ones(2, 3), torch.zeros(2, 1)))
            >>> H.congruent(torch.tensor([1.0, 0.0, 0.0, 2.0])) @ torch.ones(4)
            tensor([ 6.,  0.,  0., 12.])
        """
        from dag_hesse.operators.algebra import Congruent

        return Congruent(self, d)

    def __getitem__(self, key: Any) -> Any:
        """``H[v, w]``: a rectangular block; ``H[v]`` and ``H[[v, w, …]]``: the symmetric submatrix of some segments.

        Each of v and w is a name, a position, a glob (``*`` does not cross dots, ``**`` does), a module around
        segments, or a list of these. Segments keep the operator's order.

        Raises:
            PointError: there is no such segment.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            >>> H = dh.HessianOperator(model, (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])))
            >>> H["0.weight", "2"].shape, H[["**.bias"]].shape, H["0"].names
            ((12, 10), (6, 6), ('0.weight', '0.bias'))
        """
        from dag_hesse.operators.block import Block, Submatrix

        if not isinstance(key, tuple):
            return Submatrix(self, selected(self.names, key, "this operator"))
        if len(key) != 2:
            raise PointError(f"a block is named by two points; received {len(key)}: H[[…]] takes several.")
        return Block(self, *(selected(self.names, side, "this operator") for side in key))

    def block(self, v: Any, w: Any) -> Block:
        """The rectangular block [v, w], as ``H[v, w]``.

        Raises:
            PointError: there is no such point.
        """
        found: Block = self[v, w]
        return found

    def __reduce__(self) -> Any:
        raise OptionError(
            "an operator holds a model's graph and is not copied or pickled: make it anew from the model."
        )
