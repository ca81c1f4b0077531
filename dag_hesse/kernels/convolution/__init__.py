"""Products of a convolution, (rows, batch, channels, *side): its value, and its adjoints at input and weight."""

from dag_hesse.kernels.convolution import reference, torch
from dag_hesse.kernels.convolution.sizes import CHANNELS_LAST, Geometry, crop, geometry
from dag_hesse.kernels.dispatch import Implementation, Kernel

forward = Kernel("convolution.forward", reference.forward, (Implementation("torch", torch.forward),), writes=1)
input_adjoint = Kernel(
    "convolution.input_adjoint", reference.input_adjoint, (Implementation("torch", torch.input_adjoint),), writes=1
)
weight_adjoint = Kernel(
    "convolution.weight_adjoint", reference.weight_adjoint, (Implementation("torch", torch.weight_adjoint),), writes=1
)

__all__ = ["CHANNELS_LAST", "Geometry", "crop", "forward", "geometry", "input_adjoint", "weight_adjoint"]
