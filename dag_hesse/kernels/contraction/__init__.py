"""Matrix products of operands with a leading axis of rows, of size 1 where all rows share the operand."""

from dag_hesse.kernels.contraction import onednn, reference, torch, triton
from dag_hesse.kernels.dispatch import Implementation, Kernel

product = Kernel(
    "contraction.product",
    reference.product,
    (
        Implementation("triton", triton.product, triton.refuse_product, compiled=True),
        Implementation("onednn", onednn.product, onednn.refuse_product, traced=True),
        Implementation("torch", torch.product),
    ),
    writes=1,
)
outer = Kernel(
    "contraction.outer",
    reference.outer,
    (
        Implementation("triton", triton.outer, triton.refuse_outer, compiled=True),
        Implementation("onednn", onednn.outer, onednn.refuse_outer, traced=True),
        Implementation("torch", torch.outer),
    ),
    writes=1,
)

__all__ = ["outer", "product", "triton"]
