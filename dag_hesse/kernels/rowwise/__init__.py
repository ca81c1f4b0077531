"""Softmax, log-softmax and standardization, (rows, *x): nonlinear along some axes, alike along the others."""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.dispatch import Implementation, Kernel
from dag_hesse.kernels.rowwise import cpp, reference, torch, triton
from dag_hesse.kernels.rowwise.reference import Adjoint, Means

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _kernel(definition: Callable[Concatenate[Arena, Arguments], Result], writes: int = 0) -> Kernel[Arguments, Result]:
    name = definition.__name__
    generated = Implementation("triton", getattr(triton, name), getattr(triton, f"refuse_{name}"), compiled=True)
    program = Implementation("cpp", getattr(cpp, name), getattr(cpp, f"refuse_{name}"))
    others = program, Implementation("torch", getattr(torch, name))
    return Kernel(f"rowwise.{name}", definition, (generated, *others), writes=writes)


softmax_tangent = _kernel(reference.softmax_tangent)
softmax_adjoints = _kernel(reference.softmax_adjoints, writes=1)
log_softmax_tangent = _kernel(reference.log_softmax_tangent)
log_softmax_adjoints = _kernel(reference.log_softmax_adjoints, writes=1)
standardize_tangent = _kernel(reference.standardize_tangent)
standardize_adjoints = _kernel(reference.standardize_adjoints, writes=1)

__all__ = [
    "Adjoint",
    "Means",
    "log_softmax_adjoints",
    "log_softmax_tangent",
    "softmax_adjoints",
    "softmax_tangent",
    "standardize_adjoints",
    "standardize_tangent",
]
