"""What sweeps compute, a folder a kernel: ``reference.py`` is its definition, the other modules run it faster."""

from dag_hesse.kernels import (
    arena,
    attention,
    batch_affine,
    contraction,
    convolution,
    dispatch,
    elementwise,
    layout,
    machine,
    probe,
    program,
    rowwise,
)

dispatch.check_forced()

__all__ = [
    "arena",
    "attention",
    "batch_affine",
    "contraction",
    "convolution",
    "dispatch",
    "elementwise",
    "layout",
    "machine",
    "probe",
    "program",
    "rowwise",
]
