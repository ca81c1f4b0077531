"""Products of a convolution, (rows, batch, image channels, *side): its value, and its adjoints at input and weight."""

from dag_hesse.kernels.convolution import pointwise, reference, torch
from dag_hesse.kernels.convolution.sizes import CHANNELS_LAST, Geometry, crop, geometry
from dag_hesse.kernels.dispatch import Implementation, Kernel

forward = Kernel(
    "convolution.forward",
    reference.forward,
    (
        Implementation("pointwise", pointwise.forward, pointwise.refuse_forward),
        Implementation("torch", torch.forward, traced=True),
    ),
    writes=1,
)
input_transpose = Kernel(
    "convolution.input_transpose",
    reference.input_transpose,
    (
        Implementation("pointwise", pointwise.input_transpose, pointwise.refuse_input_transpose),
        Implementation("torch", torch.input_transpose, traced=True),
    ),
    writes=1,
)
weight_transpose = Kernel(
    "convolution.weight_transpose",
    reference.weight_transpose,
    (
        Implementation("pointwise", pointwise.weight_transpose, pointwise.refuse_weight_transpose),
        Implementation("torch", torch.weight_transpose, traced=True),
    ),
    writes=1,
)

__all__ = ["CHANNELS_LAST", "Geometry", "crop", "forward", "geometry", "input_transpose", "weight_transpose"]
