"""Products of elementwise nodes, and the algebra of their coefficients (design §3, fuse)."""

from dag_hesse.kernels.dispatch import Implementation, Kernel
from dag_hesse.kernels.elementwise import reference, torch, triton
from dag_hesse.kernels.elementwise.coefficients import (
    Adjoint,
    Coefficient,
    Coefficients,
    Gate,
    Seconds,
    add_times,
    plus_product,
    plus_times,
    product,
    reduce_to,
    times,
)
from dag_hesse.kernels.elementwise.torch import transpose

tangent = Kernel(
    "elementwise.tangent",
    reference.tangent,
    (
        Implementation("triton", triton.tangent, triton.refuse_tangent, compiled=True),
        Implementation("torch", torch.tangent),
    ),
)
adjoints = Kernel(
    "elementwise.adjoints",
    reference.adjoints,
    (
        Implementation("triton", triton.adjoints, triton.refuse_adjoints, compiled=True),
        Implementation("torch", torch.adjoints),
    ),
)

__all__ = [
    "Adjoint",
    "Coefficient",
    "Coefficients",
    "Gate",
    "Seconds",
    "add_times",
    "adjoints",
    "plus_product",
    "plus_times",
    "product",
    "reduce_to",
    "tangent",
    "times",
    "transpose",
]
