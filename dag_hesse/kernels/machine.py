"""Sizes from which one way of computing beats another, per device. Measured; nothing depends on them but speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Machine:
    """Thresholds of one kind of device.

    Attributes:
        program: elements from which a program is worth setting up.
        rows: elements from which a program on rows is faster than the vendor's kernels.
        norm: elements up to which the vendor's LayerNorm is taken where it has what is wanted.
        row: elements of the longest row that registers of a program in the caches can hold.
        row_kernel: elements of a probe from which the vendor's kernel is called for each, rather than once for all.
        product: multiply-adds of a probe's matrix product from which it is taken by itself: batched ones are slow then.
        onednn: multiply-adds of a product from which oneDNN's is faster than MKL's, which takes 10 µs less to call.
        scores: of attention, computed at a time, so that the caches hold them between products.
        gain: over the vendor's float32 product, that another way is to be foreseen to have before it is taken.
        image: positions from which a convolution of one kernel tap is a matrix product for every image.
        cells: of an image channel, copied at a time between layouts, so that caches hold them until the next is read.
    """

    program: int
    rows: int
    norm: int
    row: int
    row_kernel: int
    product: int
    onednn: int
    scores: int
    gain: float
    image: int
    cells: int


_NEVER = 1 << 62


def _mkl_is_slow() -> bool:
    """Whether there is AVX-512 that MKL does not use: it does on Intel's processors alone.

    Linux says which they are; of another system nothing is known, and MKL is trusted.
    """
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "GenuineIntel" not in text.partition("\n\n")[0]


CPU = Machine(
    program=1 << 12,
    rows=1 << 18,
    norm=_NEVER,
    row=1 << 13,
    row_kernel=1 << 14,
    product=1 << 20,
    onednn=1 << 22 if _mkl_is_slow() else _NEVER,
    scores=1 << 18,
    gain=1.15,
    image=_NEVER,
    cells=1 << 10,
)
CUDA = Machine(
    program=1 << 12,
    rows=_NEVER,
    norm=_NEVER,
    row=_NEVER,
    row_kernel=_NEVER,
    product=_NEVER,
    onednn=_NEVER,
    scores=1 << 27,
    gain=1.15,
    image=1 << 5,
    cells=_NEVER,
)


def machine(device: torch.device) -> Machine:
    """The thresholds of a device; shapes alone are planned for the CPU."""
    return CPU if device.type in ("cpu", "meta") else CUDA


__all__ = ["CPU", "CUDA", "Machine", "machine"]
