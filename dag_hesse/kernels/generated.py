"""What generated Triton kernels share: where they run, what they compute in, how code becomes a function."""

from __future__ import annotations

import linecache
import os
from contextlib import nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from math import isfinite
from typing import Any

import torch

BLOCK = 1024  # elements of an instance
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ELSEWHERE = "Triton's kernels run on "  # how a refusal begins that says no more than where tensors lie
HEAD = "import triton\nimport triton.language as tl\n\n"
_OLDEST = (3, 6)
_NUMBERS = count()


@cache  # packages do not change while a process runs, and finding them takes a millisecond a call
def available() -> str | None:
    """Why Triton cannot be used here; None if it can."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        return f"Triton {found} is older than {'.'.join(map(str, _OLDEST))}"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def home() -> str:
    """The type of device whose tensors kernels take."""
    return "cpu" if interpreted() else "cuda"


def elsewhere(x: torch.Tensor) -> str | None:
    """Why kernels do not take a tensor that lies on this device; None if they do."""
    return None if x.device.type == home() else f"{ELSEWHERE}{home()} tensors, not {x.device.type}"


def computed(dtype: torch.dtype) -> str:
    """What is computed in, where results have ``dtype``."""
    return "tl.float64" if dtype is torch.float64 else "tl.float32"


def launch(kernel: Any, elements: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Run a kernel with as many instances as so many elements need, on the device that its tensors lie on."""
    launch_grid(kernel, (max(1, -(-elements // BLOCK)),), device, *arguments, BLOCK=BLOCK, **constants)


def launch_grid(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Run a kernel with a grid of instances; ``num_warps`` and ``num_stages`` are among its constants."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants)


def number(x: float) -> str:
    """A number as code."""
    return repr(float(x)) if isfinite(x) else f'float("{x}")'


def loop(name: str, start: str, stop: str, step: str) -> str:
    """The head of a loop. In the interpreter, sizes are arrays of one element, which NumPy takes for no integers."""
    if not interpreted():
        return f"for {name} in range({start}, {stop}, {step}):"
    bounds = ", ".join(f"{x}.handle.data.item()" if x.isidentifier() else x for x in (start, stop))
    return f"for {name} in range({bounds}, {step}):"


def load(code: str, name: str) -> Any:
    """A function of generated Triton code, whose text :mod:`inspect` finds."""
    place = f"<dag_hesse triton {next(_NUMBERS)}>"
    linecache.cache[place] = (len(code), None, code.splitlines(keepends=True), place)
    scope: dict[str, Any] = {"__name__": place}
    exec(compile(code, place, "exec"), scope)
    return scope[name]


__all__ = [
    "BLOCK",
    "DTYPES",
    "ELSEWHERE",
    "HEAD",
    "available",
    "computed",
    "elsewhere",
    "home",
    "interpreted",
    "launch",
    "launch_grid",
    "load",
    "loop",
    "number",
]
