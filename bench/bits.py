"""Digests of products over the tests' models: two checkouts whose digests agree compute the same to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import dag_hesse as dh
from dag_hesse.kernels import machine
from tests.models.zoo import CASES, Case, case

KINDS: dict[str, tuple[Any, Callable[[Any, Tensor], Iterable[Tensor]]]] = {
    "full": (dh.HessianOperator, lambda H, v: [H @ v]),
    "both": (dh.HessianOperator, lambda H, v: H.parts(v)),
    "gn": (dh.GGNOperator, lambda H, v: [H @ v]),
    "tensor": (dh.TensorOperator, lambda H, v: [H @ v]),
}


@contextmanager
def _programs(on: bool) -> Iterator[None]:
    """Elementwise programs for tensors of any size, or for none."""
    least = machine.CPU.program
    machine.CPU.program = 0 if on else 1 << 60
    try:
        yield
    finally:
        machine.CPU.program = least


def _of(one: Case, space: str, kind: str, count: int) -> str:
    make, products = KINDS[kind]
    points = [*one.names, *one.parameters] if space == "activation" else None
    torch.manual_seed(0)
    H = make(one.model, one.batch, loss=one.loss, output=one.out or None, points=points, space=space, verify="none")
    generator = torch.Generator().manual_seed(0)
    found = products(H, torch.randn(H.shape[0], count, dtype=H.dtype, generator=generator))
    return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in found)).hexdigest()


def digests(dtype: torch.dtype = torch.float64) -> dict[str, str]:
    """SHA-256 of every product: models × spaces × parts × 1 and 3 vectors × programs on and off."""
    found = {}
    for name in sorted(CASES):
        for space in ("activation", "parameter"):
            for on in (False, True):
                with _programs(on):
                    for kind in KINDS:
                        for count in (1, 3):
                            key = f"{name}, {space}, {kind}, {count}, programs {'on' if on else 'off'}"
                            found[key] = _of(case(name, dtype), space, kind, count)
    return found
