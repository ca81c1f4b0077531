"""Probes: random signs, the same on every device, and the squared norms of their products."""

from dag_hesse.kernels.dispatch import Implementation, Kernel
from dag_hesse.kernels.probe import reference, torch, triton

signs = Kernel(
    "probe.signs",
    reference.signs,
    (
        Implementation("triton", triton.signs, triton.refuse_signs, compiled=True),
        Implementation("torch", torch.signs, torch.refuse_signs),
    ),
)
squares = Kernel(
    "probe.squares",
    reference.squares,
    (Implementation("triton", triton.squares, triton.refuse_squares, compiled=True),),
)

__all__ = ["signs", "squares"]
