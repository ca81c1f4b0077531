"""What products on tensor cores leave to the vendor: by PyTorch's flags, and by what 32 bits can address."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dag_hesse.kernels.contraction import triton

FLAGS = """
import torch
from dag_hesse.measure import precision, rounds_to_tf32
{said}
print(rounds_to_tf32(), rounds_to_tf32(convolutions=True), precision(torch.device("cuda"), torch.float32), sep=",")
"""


@pytest.mark.parametrize(
    "said, expected",
    [
        ("pass", "False,True,TF32 in convolutions"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "True,True,TF32 in matrix products and convolutions"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "True,True,TF32 in matrix products and convolutions"),
        ("torch.backends.cudnn.allow_tf32 = False", "False,False,"),
        ("torch.backends.cudnn.conv.fp32_precision = 'ieee'", "False,False,"),
        # PyTorch 2.11's convolutions do not take it over from all backends
        ("torch.backends.fp32_precision = torch.backends.cudnn.conv.fp32_precision = 'ieee'", "False,False,"),
    ],
)
def test_both_of_pytorchs_ways_to_allow_tf32_are_understood(said: str, expected: str) -> None:
    done = subprocess.run([sys.executable, "-c", FLAGS.format(said=said)], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize(
    "a, b, reason",
    [
        (torch.empty_strided((1, 4, 64), (1, 1 << 30, 1), device="meta"), (1, 64, 4), "too large"),  # rows far apart
        ((1, 1 << 16, 64), (1, 64, 1 << 15), "too large"),  # the result, of operands that are not
        ((1, 4, 1 << 21), (1, 1 << 21, 4), "too large"),  # more terms than a grid's axis has places
        ((1, 1 << 15, 64), (1, 64, 1 << 15), None),
    ],
)
def test_what_32_bits_cannot_address_is_refused(
    a: torch.Tensor | tuple[int, ...], b: tuple[int, ...], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "elsewhere", lambda x: None)
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    monkeypatch.setattr(triton, "available", lambda: None)
    x = a if isinstance(a, torch.Tensor) else torch.empty(a, device="meta")
    found = triton.refuse_product(x, torch.empty(b, device="meta"), None)
    assert found is None if reason is None else reason in (found or "")
