"""Models' products with all matrix products by oneDNN, in float32 against float64; and in compiled programs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import dag_hesse as dh
from dag_hesse.kernels import machine
from dag_hesse.kernels.contraction import onednn
from dag_hesse.sweep import compiled
from tests import device
from tests.models.zoo import case

NAMES = ("attention", "diamond-cat", "hf-gpt2", "tied", "encoder-dropout", "awkward", "gru-cell-loop")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what oneDNN has made, which is everything here."""
    if device.NAME != "cpu" or not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch has no oneDNN here")
    made: list[tuple[int, ...]] = []
    plain = onednn._mm

    def counted(a: Tensor, b: Tensor, to: Tensor | None) -> Tensor:
        found = plain(a, b, to)
        made.append(tuple(found.shape))
        return found

    monkeypatch.setattr(machine.CPU, "onednn", 0)
    monkeypatch.setattr(onednn, "_mm", counted)
    yield made


def single(x: object) -> object:
    return x.float() if isinstance(x, Tensor) and x.dtype is torch.float64 else x


@pytest.mark.parametrize("space", ["parameter", "activation"])
@pytest.mark.parametrize("name", NAMES)
def test_products_of_models(name: str, space: str, calls: list[tuple[int, ...]]) -> None:
    c = case(name)
    found, models = [], (c.model, copy.deepcopy(c.model).float())
    for model, batch in zip(models, (c.batch, tree_map(single, c.batch)), strict=True):
        torch.manual_seed(99)  # dropout masks
        operator = dh.HessianOperator(model, batch, loss=c.loss, space=space, verify="none")
        v = torch.randn(operator.shape[0], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found.append([x.double() for x in operator.parts(v.to(operator.dtype))])
    assert calls
    whole = sum(x.norm() for x in found[0])
    for wide, narrow in zip(*found, strict=True):
        assert (wide - narrow).norm() < 2e-5 * whole


def test_compiled_programs_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, real = [], compiled._compiled

    def noted(part: torch.fx.GraphModule, inputs: Any) -> Any:
        codes.append(part.code)
        return real(part, inputs)

    monkeypatch.setattr(compiled, "_compiled", noted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 4))
    batch = torch.randn(6, 8), torch.arange(6) % 4
    plain, program = (dh.HessianOperator(model, batch, compile=compile) for compile in (False, True))
    v = torch.randn(plain.shape[0])
    assert torch.allclose(program @ v, plain @ v, rtol=1e-4, atol=1e-5)
    assert len(codes) == 2
    for code in codes:
        assert "times_transpose" in code and "aten.mm" not in code and "aten.addmm" not in code
