"""The diagonal contraction: sweeps of any elementwise node (design §3, fuse)."""

from dag_hesse.kernels.pointwise.naive import (
    Coefficient,
    Gate,
    add_times,
    adjoint,
    curvature,
    plus_product,
    plus_times,
    product,
    reduce_to,
    tangent,
    times,
)

__all__ = [
    "Coefficient",
    "Gate",
    "add_times",
    "adjoint",
    "curvature",
    "plus_product",
    "plus_times",
    "product",
    "reduce_to",
    "tangent",
    "times",
]
