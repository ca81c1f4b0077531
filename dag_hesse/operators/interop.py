"""Our operators as curvlinops' operators, and its estimators run on them. curvlinops is an optional extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dag_hesse.errors import DependencyError
from dag_hesse.randomness import preserved

if TYPE_CHECKING:
    from dag_hesse.operators.base import SymmetricOperator


def _curvlinops() -> Any:
    try:
        import curvlinops
    except ImportError as error:
        raise DependencyError(
            f"this needs curvlinops ({error}): pip install 'dag-hesse[curvlinops]', or multiply with your own vectors."
        ) from error
    return curvlinops


def to_curvlinops(operator: SymmetricOperator) -> Any:
    """A ``curvlinops`` linear operator with the same segments, dtype and device."""
    _curvlinops()
    from curvlinops._torch_base import PyTorchLinearOperator

    class Wrapped(PyTorchLinearOperator):  # type: ignore[misc]
        SELF_ADJOINT = True
        dtype, device = operator.dtype, operator.device

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return operator @ X

    shapes = list(operator.form.shapes)
    return Wrapped(shapes, shapes)


def estimate(operator: SymmetricOperator, name: str, matvecs: int, seed: int, **options: Any) -> Any:
    """Run the estimator ``curvlinops.<name>`` with ``matvecs`` products; the global RNG stays as it was."""
    estimator, wrapped = getattr(_curvlinops(), name), to_curvlinops(operator)
    with preserved():
        torch.manual_seed(seed)
        return estimator(wrapped, matvecs, **options)
