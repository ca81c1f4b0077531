"""Programs: elementwise functions and functions of rows in one pass over memory, recorded from plain torch code."""

from dag_hesse import native
from dag_hesse.kernels.dispatch import Implementation, Kernel
from dag_hesse.kernels.program import cpp, reference, triton
from dag_hesse.kernels.program.build import Builder, Program
from dag_hesse.kernels.program.recorder import NamedProgram, Refused, record

run = Kernel(
    "program",
    reference.run,
    (Implementation("triton", triton.run, triton.refuse, compiled=True), Implementation("cpp", cpp.run, cpp.refuse)),
)
if native.core is None:  # named in reports, as what fails
    run.failures["cpp"] = native.MISSING

__all__ = ["Builder", "NamedProgram", "Program", "Refused", "record", "run"]
