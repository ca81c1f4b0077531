"""Every implementation of every kernel against its reference, at its cases, in memory that is poisoned before."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dag_hesse import native
from dag_hesse.kernels import contraction, generated, machine
from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.dispatch import KERNELS, Implementation, Kernel
from dag_hesse.kernels.elementwise import Gate
from tests import device
from tests.oracle import error

FOLDERS = (
    "attention",
    "batch_affine",
    "contraction",
    "convolution",
    "elementwise",
    "layout",
    "probe",
    "program",
    "rowwise",
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}


class Poisoned(Arena):
    """Gives out memory full of NaN: what is not written shows."""

    def serves(self, like: Tensor, count: int) -> bool:
        return True

    def take(self, like: Tensor, count: int) -> Tensor:
        return like.new_full((count,), math.nan)


def cases(
    dtype: torch.dtype, where: str | None = None
) -> Iterator[tuple[Kernel[..., Any], Implementation, tuple[Any, ...]]]:
    torch.manual_seed(0)
    for folder in FOLDERS:
        with torch.device(device.NAME):
            given = list(importlib.import_module(f"dag_hesse.kernels.{folder}.cases").cases(dtype))
        for kernel, arguments in given:
            for one in kernel.implementations:
                if one.compiled or not generated.interpreted():  # the others need no interpreter
                    yield kernel, one, arguments


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def bare(x: Any) -> Any:
    """As a shape."""
    if isinstance(x, Gate):
        return Gate(x.value.to("meta"))
    return x.to("meta") if isinstance(x, Tensor) else x


def double(x: Any) -> Any:
    """In float64."""
    if isinstance(x, Gate):
        return Gate(x.value.double())
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def copies(arguments: Any) -> Any:
    """Arguments that may be written to."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments)


@pytest.mark.parametrize("least", ["as measured", "always"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_implementations_agree_with_their_reference(
    dtype: torch.dtype, least: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if least == "always":
        for name in ("program", "rows", "norm", "row_kernel", "product", "onednn"):
            monkeypatch.setattr(machine.CPU, name, 0)
        monkeypatch.setattr(machine.CPU, "cells", 4)
        monkeypatch.setattr(machine.CPU, "scores", 8)
        monkeypatch.setattr(machine.CUDA, "program", 0)
        monkeypatch.setattr(machine.CUDA, "gain", 0)
        monkeypatch.setattr(machine.CPU, "image", 0)
        monkeypatch.setattr(machine.CUDA, "image", 0)
    ran, reasons = set[str](), set[str]()
    for kernel, one, arguments in cases(dtype):
        reason = one.refuse(*arguments)
        if reason is not None:
            reasons.add(f"{kernel.name}, {one.name}: {reason}")
            continue
        expected = kernel.reference(Arena(), *copies(arguments))
        given = copies(arguments)
        found = one.run(Poisoned(), *given)
        name = f"{kernel.name}, {one.name}, {[tuple(x.shape) for x in tensors(arguments)]}"
        changed = [
            k for k, (x, y) in enumerate(zip(tensors(given), tensors(arguments), strict=True)) if not torch.equal(x, y)
        ]
        results = {x.untyped_storage().data_ptr() for x in tensors(found)}
        into = [k for k in changed if tensors(given)[k].untyped_storage().data_ptr() in results]
        assert changed == into and len(into) <= kernel.writes, f"{name}: arguments {changed} were written to"
        ran.add(f"{kernel.name}, {one.name}")
        if isinstance(expected, dict):
            assert found.keys() == expected.keys(), name
        for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype), name
            off = error(x, y.double(), 1e-3)
            assert off < TOLERANCE[dtype], f"{name}: off by {off:.2g}"
    print(*sorted(reasons), sep="\n")
    others = () if generated.interpreted() else ("attention",)  # they are for float16 and bfloat16
    others += ("contraction",) if dtype is torch.float64 else ()  # they are for float32
    generated_ones = {f"{k.name}, {one.name}" for k, one, _ in cases(dtype) if one.compiled}
    generated_ones = {name for name in generated_ones if not name.startswith(others)}
    assert generated_ones <= ran or generated.home() != device.NAME or least != "always"
    if least == "always" and dtype is torch.float32 and native.core is not None:
        always = {f"{k.name}, {one.name}" for k, one, _ in cases(dtype) if not one.compiled}
        assert always <= ran, f"{always - ran} refuse every case, so nothing is known of them"


@pytest.mark.skipif(
    "generated.home() != device.NAME", reason="where generated kernels run: test_triton.py has them run"
)
def test_generated_kernels_agree_in_half_precision() -> None:
    # They compute in float32, so the reference is taken in float64; what they are given is rounded.
    for kernel, one, arguments in cases(torch.float16):
        if not one.compiled or kernel.name == "program" or one.refuse(*arguments) is not None:
            continue
        expected = kernel.reference(Arena(), *tree_map(double, arguments))
        found = one.run(Poisoned(), *copies(arguments))
        for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert x.dtype in (torch.float16, torch.float64)  # norms are float64
            assert error(x, y, 1e-2) < 5e-3, kernel.name


@pytest.mark.skipif(
    "generated.home() != device.NAME", reason="where generated kernels run: test_triton.py has them run"
)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7F800000], ids=["nan", "-nan", "snan", "inf"])
def test_products_of_parts_hide_nothing_that_is_not_finite(bits: int) -> None:
    # A GPU's own NaN has all bits set: rounded as a number it would become zero.
    for place in (0, 1):
        operands = [torch.randn(1, 40, 40, device=device.NAME) for _ in range(2)]
        operands[place].view(torch.int32)[0, 3, 5] = bits
        found = contraction.triton.product(Arena(), *operands, None)[0]
        wrong = (torch.arange(40, device=device.NAME) == (3, 5)[place])[:, None]
        assert torch.equal(~found.isfinite(), (wrong if place == 0 else wrong.mT).expand(40, 40))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_implementations_run_on_shapes_or_refuse(dtype: torch.dtype) -> None:
    # What a call keeps is found by running it on tensors without memory; and none makes one on another device.
    for kernel, one, arguments in cases(dtype):
        shapes = tree_map(bare, arguments)
        runs = [kernel.reference] + ([one.run] if one.refuse(*shapes) is None else [])
        for run in runs:
            assert all(x.is_meta for x in tensors(run(Arena(), *shapes))), f"{kernel.name}, {one.name}"


def test_every_kernel_has_cases() -> None:
    import pkgutil

    import dag_hesse.kernels

    folders = {f.name for f in pkgutil.iter_modules(dag_hesse.kernels.__path__) if f.ispkg}
    assert folders == set(FOLDERS), "FOLDERS in this file and the folders of kernels differ"
    assert folders <= set(dag_hesse.kernels.__all__), "a folder has no line in kernels/__init__.py"
    kernels = {name for name in KERNELS if name.split(".")[0] in FOLDERS}
    missing = kernels - {kernel.name for kernel, *_ in cases(torch.float32)}
    assert not missing, f"cases.py has none of {missing}"
