"""Products of elementwise nodes, and the algebra of their coefficients (design §3, fuse)."""

from dag_hesse.kernels.diagonal import reference, torch
from dag_hesse.kernels.diagonal.coefficients import (
    Coefficient,
    Gate,
    add_times,
    plus_product,
    plus_times,
    product,
    reduce_to,
    times,
)
from dag_hesse.kernels.diagonal.torch import adjoint
from dag_hesse.kernels.dispatch import Implementation, Kernel

tangent = Kernel("diagonal.tangent", reference.tangent, (Implementation("torch", torch.tangent),))
adjoints = Kernel("diagonal.adjoints", reference.adjoints, (Implementation("torch", torch.adjoints),))

__all__ = [
    "Coefficient",
    "Gate",
    "add_times",
    "adjoint",
    "adjoints",
    "plus_product",
    "plus_times",
    "product",
    "reduce_to",
    "tangent",
    "times",
]
