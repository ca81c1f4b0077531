"""Attention as one node: its value, its tangents, and its transposes with second-order terms (design §3, rules)."""

from dag_hesse.kernels.attention import reference, torch, triton
from dag_hesse.kernels.attention.operands import Adjoint, Bound, Operands, Residual
from dag_hesse.kernels.dispatch import Implementation, Kernel

value = Kernel("attention.value", reference.value, (Implementation("torch", torch.value),))
tangent = Kernel(
    "attention.tangent",
    reference.tangent,
    (
        Implementation("triton", triton.tangent, triton.refuse_tangent, compiled=True),
        Implementation("torch", torch.tangent),
    ),
)
adjoints = Kernel(
    "attention.adjoints",
    reference.adjoints,
    (
        Implementation("triton", triton.adjoints, triton.refuse_adjoints, compiled=True),
        Implementation("torch", torch.adjoints),
    ),
    writes=3,
)

__all__ = ["Adjoint", "Bound", "Operands", "Residual", "adjoints", "tangent", "value"]
