"""The README's example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import dag_hesse as dh


def test_example_of_stored_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    found = re.search(r"## Stored blocks\n\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, layer in zip(
        ["layer1", "act1", "layer2", "act2", "layer3", "act3", "head"],
        [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)],
        strict=True,
    ):
        model.add_module(name, layer)
    monkeypatch.chdir(tmp_path)
    batch = torch.randn(9, 6), torch.arange(9) % 3
    size = dh.BlockMatrix.from_model(model, batch, points=["layer*"]).shape[0]
    code = found[1].replace("from_model(model, batch,", "from_model(model, batch, points=['layer*'],")
    exec(code, {"dh": dh, "model": model, "batch": batch, "z": torch.ones(size)})
    assert (tmp_path / "blocks.safetensors").exists()
