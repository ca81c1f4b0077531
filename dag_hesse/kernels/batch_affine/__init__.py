"""BatchNorm by given statistics: what is affine in x per image channel, its transposes, and sums per channel."""

from dag_hesse.kernels.batch_affine import reference, torch, triton
from dag_hesse.kernels.dispatch import Implementation, Kernel

sums = Kernel(
    "batch_affine.sums",
    reference.sums,
    (
        Implementation("triton", triton.sums, triton.refuse_sums, compiled=True),
        Implementation("torch", torch.sums, torch.refuse),
    ),
)
tangent = Kernel(
    "batch_affine.tangent",
    reference.tangent,
    (
        Implementation("triton", triton.tangent, triton.refuse_tangent, compiled=True),
        Implementation("torch", torch.tangent),
    ),
)
adjoint = Kernel(
    "batch_affine.adjoint",
    reference.adjoint,
    (
        Implementation("triton", triton.adjoint, triton.refuse_adjoint, compiled=True),
        Implementation("torch", torch.adjoint),
    ),
)

__all__ = ["adjoint", "sums", "tangent"]
