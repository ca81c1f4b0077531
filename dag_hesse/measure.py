"""Memory that is free; seconds and peak memory of a block of code."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Phase:
    """Seconds of the wall clock, and how far memory rose above where it began (bytes)."""

    seconds: float = 0.0
    peak_bytes: int = 0


def available_memory(device: torch.device | None = None) -> int:
    """Bytes that are free now: of main memory, or of a GPU's, with what PyTorch holds there and does not use."""
    if device is not None and device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4 << 30


def rounds_to_tf32(convolutions: bool = False) -> bool:
    """Whether the vendor may round operands of float32 products, or of convolutions, to TF32 on a GPU.

    That may have been said by ``allow_tf32``, or by ``fp32_precision``: then PyTorch gives the former no more.
    """
    backend: Any = torch.backends.cuda.matmul
    if convolutions:
        backend = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(backend, "fp32_precision"):
        return bool(backend.fp32_precision == "tf32")
    return bool((torch.backends.cudnn if convolutions else backend).allow_tf32)


def precision(device: torch.device, dtype: torch.dtype) -> str:
    """What products of float32 are rounded to before they are added up, where PyTorch's flags allow it; "" if nothing.

    Examples:
        >>> precision(torch.device("cpu"), torch.float64)
        ''
    """
    if dtype is not torch.float32:
        return ""
    if device.type != "cuda":
        lowered = torch.get_float32_matmul_precision()
        return "" if lowered == "highest" else f"float32 matrix products at {lowered!r} precision"
    allowed = {"matrix products": rounds_to_tf32(), "convolutions": rounds_to_tf32(convolutions=True)}
    reduced = [what for what, on in allowed.items() if on]
    return f"TF32 in {' and '.join(reduced)}" if reduced else ""


def _status(key: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))


def _highest() -> int:
    """The largest resident set so far."""
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def _settle() -> int:
    """Give freed memory back, start the high-water mark anew where the system can, and return the memory in use."""
    if sys.platform != "linux":
        return _highest()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return _highest()  # without the reset, growth above the old mark is all that can be seen
    return _status("VmRSS")


@contextmanager
def measured(device: torch.device | None = None) -> Iterator[Phase]:
    """Fill a :class:`Phase` while a block runs: its memory is the device's, or the process's where that is the CPU.

    Examples:
        >>> from dag_hesse.measure import measured
        >>> with measured() as phase:
        ...     zeros = bytearray(1 << 26)
        >>> phase.peak_bytes >> 26
        1
    """
    phase, cuda = Phase(), device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else _settle()
    start = time.perf_counter()
    try:
        yield phase
    finally:
        if cuda:
            torch.cuda.synchronize(device)
        phase.seconds = time.perf_counter() - start
        phase.peak_bytes = (torch.cuda.max_memory_allocated(device) if cuda else _highest()) - before
