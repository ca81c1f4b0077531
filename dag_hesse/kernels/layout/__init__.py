"""A tensor in another memory layout: itself where it has that, else a copy."""

from dag_hesse.kernels.dispatch import Implementation, Kernel
from dag_hesse.kernels.layout import cpp, reference, torch

laid_out = Kernel(
    "layout",
    reference.laid_out,
    (Implementation("cpp", cpp.laid_out, cpp.refuse), Implementation("torch", torch.laid_out)),
)

__all__ = ["laid_out"]
