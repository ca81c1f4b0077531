"""``python -m bench kernels``: implementations of a kernel side by side, by the share of the copy bandwidth they reach.

Each is compared with the kernel's reference first. Bytes are counted: every operand is read once, every result written.
On a GPU the time is the device's: calls are recorded and replayed, as sweeps are. There the reference is compiled by
TorchInductor too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bench.timing import RESULTS, device_seconds, interleaved, median, write_json
from dag_hesse.ir import Kind, Node, Ref
from dag_hesse.kernels import (
    attention,
    batch_affine,
    contraction,
    convolution,
    elementwise,
    layout,
    probe,
    program,
    rowwise,
)
from dag_hesse.kernels.arena import SYSTEM
from dag_hesse.kernels.dispatch import Kernel
from dag_hesse.rules.chain import fuse_members

ROUNDS, PROBES = 9, 8
COUNT = {"cuda": 1 << 24, "cpu": 1 << 20}  # elements
UNITS = {"GB/s": ".0f", "of a copy": ".2f", "GFLOP/s": ".0f"}


@dataclass(frozen=True)
class Case:
    """A kernel with arguments, and the bytes that it must move, or the FLOPs that it takes where these decide.

    ``exact``: results are held against the reference in float64 too.
    """

    name: str
    kernel: Kernel[..., Any]
    arguments: tuple[Any, ...]
    bytes: int
    flops: int = 0
    exact: bool = False


def cases(device: torch.device, count: int) -> Iterator[Case]:
    """Programs and sweeps of elementwise nodes, probes, and sweeps of nodes of rows, on ``count`` elements."""

    def normal(*rows: int) -> Tensor:
        return torch.randn(*rows, count, device=device)

    x, lam = normal(), normal()
    for name in ("gelu", "silu"):
        made = activation(name, x, lam)
        yield Case(f"partials of {name}", program.run, (made, [x, lam], x), 4 * count * (2 + made.results))
    c, h, tangents, abar = normal(), normal(), normal(PROBES), normal(2 * PROBES)
    gate = elementwise.Gate(x)
    for name, first, loaded in (("", c, 1), (" of a gate", gate, 1)):
        moved = 4 * count * (loaded + 2 * PROBES)
        of = elementwise.Coefficients([first], {(0, 0): h}, (count,))
        yield Case(f"tangent{name}", elementwise.tangent, (of, {0: tangents}), moved)
    of = elementwise.Coefficients([c], {(0, 0): h}, (count,))
    back = elementwise.Adjoint(abar, {0: tangents}, slice(PROBES, None), {0: (count,)})
    yield Case("adjoints of both channels", elementwise.adjoints, (of, back), 4 * count * (2 + 5 * PROBES))
    yield from images(x, tangents)
    drawn = (0, 0, (PROBES, 1, count), x)
    yield Case("signs", probe.signs, drawn, 4 * count * PROBES)
    yield Case("squares of two parts", probe.squares, (abar.view(2, PROBES, 1, count).unbind(),), 8 * count * PROBES)
    for length in (1 << 10, 1 << 16):
        yield from rows_of(length, x, tangents, abar)
    yield from products(device)
    yield from heads_of(8192 if device.type == "cuda" else 256, device)


def images(x: Tensor, tangents: Tensor) -> Iterator[Case]:
    """Layouts and BatchNorm of images of 32² in 64 channels, layouts of 16² in 256 too."""
    for channels, side in ((64, 32), (256, 16)):
        given = x.view(-1, channels, side, side)
        last = given.contiguous(memory_format=torch.channels_last)
        for to, one, what in ((torch.channels_last, given, "last"), (torch.contiguous_format, last, "first")):
            yield Case(f"channels {what}, {channels} of {side}²", layout.laid_out, (one, to), 8 * x.numel())
    x, tangents = x.view(-1, 64, 32, 32), tangents.view(PROBES, -1, 64, 32, 32)
    gain, mean, numbers = torch.ones(64, device=x.device), torch.zeros(64, device=x.device), tangents[:, 0, :, 0, 0]
    numbers, size = numbers.contiguous(), 4 * x.numel()
    moved, adjoint = (gain, tangents, x, numbers, numbers), (gain, tangents, x[None], numbers, slice(None))
    yield Case("BatchNorm tangent", batch_affine.tangent, moved, size * (1 + 2 * PROBES))
    yield Case("BatchNorm adjoint", batch_affine.adjoint, adjoint, size * (1 + 2 * PROBES))
    yield Case("BatchNorm sums", batch_affine.sums, (tangents, x[None], mean, gain, gain, 0.0), size * (1 + PROBES))


def rows_of(length: int, x: Tensor, tangents: Tensor, abar: Tensor) -> Iterator[Case]:
    """Softmax, log-softmax and LayerNorm of rows of so many elements."""
    x, (tangents, abar) = x.view(-1, length), (t.view(len(t), -1, length) for t in (tangents, abar))
    y, p, channel, how = torch.nn.functional.layer_norm(x, [length]), torch.softmax(x, -1), slice(PROBES, None), [-1]
    number, numbers, norm = y[:, :1].contiguous(), tangents[..., :1].contiguous(), rowwise.Means(how, True, [length])
    second = (x, number, tangents, numbers, numbers)
    for name, kernel, arguments, moved in (
        ("softmax tangent", rowwise.softmax_tangent, (p, tangents, how), 1 + 3 * PROBES),
        (
            "softmax adjoints",
            rowwise.softmax_adjoints,
            (p, rowwise.Adjoint(abar, (x, tangents), channel), how),
            2 + 5 * PROBES,
        ),
        ("log-softmax tangent", rowwise.log_softmax_tangent, (p, tangents, how), 1 + 2 * PROBES),
        (
            "log-softmax adjoints",
            rowwise.log_softmax_adjoints,
            (p, rowwise.Adjoint(abar, (number, tangents), channel), how),
            1 + 5 * PROBES,
        ),
        (
            "LayerNorm tangent",
            rowwise.standardize_tangent,
            (y, number, x, tangents, norm),
            2 + 2 * PROBES,
        ),
        (
            "LayerNorm adjoints",
            rowwise.standardize_adjoints,
            (y, number, rowwise.Adjoint(abar, second, channel), norm),
            2 + 5 * PROBES,
        ),
    ):
        yield Case(f"{name}, rows of {length:,}", kernel, arguments, 4 * x.numel() * moved)


def products(device: torch.device) -> Iterator[Case]:
    """Products of a layer from 768 to 3072, in float32, and of its weight's adjoint."""
    samples, inner, outer = (4096, 768, 3072) if device.type == "cuda" else (256, 96, 384)
    x, w, g = (torch.randn(1, *s, device=device) for s in ((samples, inner), (outer, inner), (samples, outer)))
    flops = 2 * samples * inner * outer
    yield Case("product with a weight", contraction.product, (x, w.mT, None), 0, flops, True)
    yield Case("product with its transpose", contraction.product, (g, w, None), 0, flops, True)
    yield Case("adjoint of the weight", contraction.outer, ([(g, x)], False, None), 0, flops, True)
    images, side, inner, outer = (64, 56, 64, 256) if device.type == "cuda" else (2, 14, 16, 64)
    x, w, g = (
        torch.randn(1, *shape, device=device)
        for shape in ((images, inner, side, side), (outer, inner, 1, 1), (images, outer, side, side))
    )
    geo = convolution.geometry(x.shape[1:], w.shape[1:], g.shape[1:], (None, None, None, [1], [0], [1], False, [0], 1))
    flops = 2 * images * side**2 * inner * outer
    yield Case("1×1 convolution", convolution.forward, (geo, x, w, None), 0, flops, True)
    yield Case("its adjoint at the image", convolution.input_transpose, (geo, g, w, None), 0, flops, True)
    yield Case("its adjoint at the weight", convolution.weight_transpose, (geo, [(g, x)], None), 0, flops, True)


def heads_of(size: int, device: torch.device) -> Iterator[Case]:
    """Attention of one head of 64, ``size`` queries and keys, in bfloat16 where tiles take it: by the tile products."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*rows: int) -> Tensor:
        return torch.randn(*rows, 8, size, 64, device=device, dtype=dtype)

    (q, k, v), (dq, dk, dv), abar, lam = normal(3), normal(3, 1), normal(2), normal()
    a = attention.Operands(q, k.mT, v, (1, 8), scale=1 / 8)
    out, product = attention.value(SYSTEM, a), 2 * 8 * size * size * 64
    tangents = {0: dq, 1: dk.mT, 2: dv}
    moved, mu = attention.tangent(SYSTEM, a, out, tangents)
    bound = attention.Bound(lam, (lam * out).sum(-1, keepdim=True))
    residual = attention.Residual(tangents, mu, (lam * moved).sum(-1, keepdim=True))
    both = a, out, bound, attention.Adjoint(abar, residual, slice(1, None), (0, 1, 2), {})
    yield Case("attention tangent", attention.tangent, (a, out, tangents), 0, 5 * product)
    yield Case("attention adjoints", attention.adjoints, both, 0, (7 + 18) * product)


def activation(name: str, x: Tensor, lam: Tensor) -> program.Program:
    """c, h and the λ that goes on, of ``aten.<name>`` at tensors like ``x`` and ``lam``: a region's program."""
    op = getattr(torch.ops.aten, name).default
    node = Node(1, str(op), op, (Ref(0),), {}, (0,), tuple(x.shape), x.dtype, Kind.SMOOTH)

    def code(x: Tensor, lam: Tensor) -> dict[Hashable, Any]:
        found = fuse_members([(1, node)], {0: x, 1: op(x)}, [0]).descend(lam, [0])
        return {"c": found.first[0], "h": found.second[0, 0], "λ": found.pulled[0]}

    return program.record(code, [x, lam], x).program


def seconds(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Median of each: on a GPU, of the device's own time."""
    if device.type == "cuda":
        return {name: device_seconds(run) for name, run in runs.items()}
    return {name: median(found) for name, found in interleaved(runs, ROUNDS).items()}


def roofline(device: torch.device, count: int) -> dict[str, float]:
    """What the device does at best: bytes a second of a copy, and FLOPs a second of matrix products."""
    size = 8192 if device.type == "cuda" else 512
    x, y = torch.randn(count * PROBES, device=device), torch.empty(count * PROBES, device=device)
    found = {"copy GB/s": 8 * x.numel() / seconds({"": lambda: torch.mul(x, 2.0, out=y)}, device)[""] / 1e9}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        took = seconds({"": lambda a=a, b=b: a @ b}, device)[""]  # type: ignore[misc]
        found[f"{str(dtype).removeprefix('torch.')} TFLOP/s"] = 2 * size**3 / took / 1e12
    return found


def _off(found: Any, expected: Any) -> float:
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    return max(float((a.to(b.dtype) - b).norm() / b.norm()) for a, b in pairs)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else x


def measure(device: torch.device, count: int, bandwidth: float, compile_until: float | None) -> list[dict[str, Any]]:
    """Per case and implementation: bytes a second, and the share of ``bandwidth``.

    References are compiled too, until that much is shown by the monotonic clock.
    """
    rows = list[dict[str, Any]]()
    for case in cases(device, count):
        expected = tree_leaves(case.kernel.reference(SYSTEM, *case.arguments))
        in_float64 = case.kernel.reference(SYSTEM, *tree_map(_double, case.arguments)) if case.exact else None
        errors = {"reference": _off(expected, in_float64)} if case.exact else {}
        runs: dict[str, Callable[[], Any]] = {"reference": partial(case.kernel.reference, SYSTEM, *case.arguments)}
        for one in case.kernel.implementations:
            if one.refuse(*case.arguments) is not None:
                continue
            run = partial(one.run, SYSTEM, *case.arguments)
            off = _off(run(), expected)
            if case.exact:
                errors[one.name] = _off(run(), in_float64)
            right = off < (3e-2 if expected[0].dtype is torch.bfloat16 else 1e-5)
            if right:
                runs[one.name] = run
            rows += [] if right else [{"case": case.name, "implementation": one.name, "error": off}]
        if compile_until is not None and time.monotonic() < compile_until:
            torch._dynamo.reset()  # or the ninth would run as it is
            runs["reference, torch.compile"] = torch.compile(runs["reference"], dynamic=False)
        for name, took in seconds(runs, device).items():
            speed = (case.flops or case.bytes) / took
            row = {"case": case.name, "implementation": name, "GFLOP/s" if case.flops else "GB/s": speed / 1e9}
            row |= {"error in float64": errors[name]} if name in errors else {}
            rows.append(row if case.flops else {**row, "of a copy": speed / bandwidth})
    return rows


def main(folder: Path = RESULTS, compile_until: float | None = math.inf) -> int:
    """Measure, print and write."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name().replace(" ", "-") if device.type == "cuda" else "cpu"
    count = COUNT[device.type]
    best = roofline(device, count)
    rows = measure(device, count, best["copy GB/s"] * 1e9, compile_until if device.type == "cuda" else None)
    table = Table("kernel", "implementation", *UNITS, title=f"Kernels, {card}", title_justify="left")
    for row in rows:
        cells = [f"{row[unit]:{digits}}" if unit in row else "" for unit, digits in UNITS.items()]
        wrong = f"off by {row['error']:.1e}" if "error" in row else ""
        table.add_row(row["case"], row["implementation"], *([wrong, "", ""] if wrong else cells))
    console = Console(width=120)
    console.print(", ".join(f"{what}: {value:.0f}" for what, value in best.items()))
    console.print(table)
    write_json("kernels" if device.type == "cpu" else f"gpu/{card}-kernels", {"best": best, "kernels": rows}, folder)
    return sum("error" in row for row in rows)
