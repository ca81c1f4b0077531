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

from dag_hesse.kernels import machine
from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.dispatch import Implementation, Kernel
from tests.oracle import error

FOLDERS = ("batch_affine", "contraction", "convolution", "diagonal", "layout", "program", "rowwise")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}


class Poisoned(Arena):
    """Gives out memory full of NaN: what is not written shows."""

    def _taken(self, like: Tensor, count: int) -> Tensor | None:
        return like.new_full((count,), math.nan)


def cases(dtype: torch.dtype) -> Iterator[tuple[Kernel[..., Any], Implementation, tuple[Any, ...]]]:
    torch.manual_seed(0)
    for folder in FOLDERS:
        for kernel, arguments in importlib.import_module(f"dag_hesse.kernels.{folder}.cases").cases(dtype):
            for one in kernel.implementations:
                yield kernel, one, arguments


def copies(arguments: Any) -> Any:
    """Arguments that may be written to."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments)


@pytest.mark.parametrize("least", ["as measured", "always"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_implementations_agree_with_their_reference(
    dtype: torch.dtype, least: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if least == "always":
        for name in ("program", "row_kernel", "product"):
            monkeypatch.setattr(machine.CPU, name, 0)
        monkeypatch.setattr(machine.CPU, "cells", 4)
    ran, reasons = dict[str, int](), set[str]()
    for kernel, one, arguments in cases(dtype):
        reason = one.refuse(*arguments)
        if reason is not None:
            reasons.add(f"{kernel.name}, {one.name}: {reason}")
            continue
        expected = kernel.reference(Arena(), *copies(arguments))
        found = one.run(Poisoned(), *copies(arguments))
        name = f"{kernel.name}, {one.name}"
        ran[name] = ran.get(name, 0) + 1
        if isinstance(expected, dict):
            assert found.keys() == expected.keys(), name
        for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert x.shape == y.shape, name
            assert error(x, y.double(), 1e-3) < TOLERANCE[dtype], name
    print(*sorted(reasons), sep="\n")
    wanted = {f"{k.name}, {one.name}" for k, one, _ in cases(dtype)}
    assert set(ran) == wanted if least == "always" else set(ran) <= wanted


def test_every_folder_of_kernels_has_cases() -> None:
    import pkgutil

    import dag_hesse.kernels

    assert {f.name for f in pkgutil.iter_modules(dag_hesse.kernels.__path__) if f.ispkg} == set(FOLDERS)
