"""Products of a convolution, (rows, batch, image channels, *side): its value, and its adjoints at input and weight."""

from dag_hesse.kernels.convolution import reference, torch
from dag_hesse.kernels.convolution.sizes import CHANNELS_LAST, Geometry, crop, geometry
from dag_hesse.kernels.dispatch import Implementation, Kernel

forward = Kernel("convolution.forward", reference.forward, (Implementation("torch", torch.forward),), writes=1)
input_transpose = Kernel(
    "convolution.input_transpose",
    reference.input_transpose,
    (Implementation("torch", torch.input_transpose),),
    writes=1,
)
weight_transpose = Kernel(
    "convolution.weight_transpose",
    reference.weight_transpose,
    (Implementation("torch", torch.weight_transpose),),
    writes=1,
)

__all__ = ["CHANNELS_LAST", "Geometry", "crop", "forward", "geometry", "input_transpose", "weight_transpose"]
