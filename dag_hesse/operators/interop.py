"""Our operators as curvlinops' operators. curvlinops is an optional extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dag_hesse.errors import DependencyError

if TYPE_CHECKING:
    from dag_hesse.operators.core import SegmentedOperator


def _curvlinops() -> Any:
    try:
        import curvlinops
    except ImportError as error:
        raise DependencyError(
            f"this needs curvlinops ({error}): pip install 'dag-hesse[curvlinops]', or multiply with your own vectors."
        ) from error
    return curvlinops


def to_curvlinops(operator: SegmentedOperator) -> Any:
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
