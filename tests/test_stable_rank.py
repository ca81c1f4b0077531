"""Stable ranks are looked for as exactly as was asked, or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.cli import main
from dag_hesse.errors import OptionError


def _wide() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(96, 96), nn.SiLU())]
    return nn.Sequential(*layers, nn.Linear(96, 40)), (torch.randn(16, 96), torch.arange(16) % 40)


def test_without_stable_ranks_all_else_is_the_same_in_half_the_sweeps() -> None:
    model, batch = _wide()
    whole = dh.analyze(model, batch, mode="probes", probes=8)
    found = dh.analyze(model, batch, mode="probes", probes=8, stable_rank=False)
    assert np.isnan(found.stable_rank).all()
    assert (found.method["stable_rank"] == "skipped").all()
    assert (whole.method["stable_rank"] == "probes").all()
    for metric in ("resonance", "coupling", "gn_gap", "gn_norm", "tensor_norm"):
        assert np.array_equal(found[metric], whole[metric])
        assert (found.method[metric] == whole.method[metric]).all()
    assert found.facts["sweeps"] == 8 * len(found.names) < whole.facts["sweeps"] / 2
    assert found.facts["predicted_flops"] < whole.facts["predicted_flops"] / 2
    assert "stable rank" in str(whole)
    assert "stable rank" not in str(found)
    assert json.loads(json.dumps(found.to_dict()))["metrics"]["stable_rank"]["value"][0] == [None] * len(found.names)
    found.plot()


def test_stable_ranks_that_take_no_search_are_given_all_the_same() -> None:
    model, batch = _wide()
    for mode in ("exact", "gram"):
        whole = dh.analyze(model, batch, mode=mode)
        found = dh.analyze(model, batch, mode=mode, stable_rank=False)
        known = whole.method["stable_rank"] != "probes"
        assert known.any()
        assert np.array_equal(found.stable_rank[known], whole.stable_rank[known])
        assert np.isnan(found.stable_rank[~known]).all()


def test_the_search_is_as_exact_as_rtol() -> None:
    model, batch = _wide()
    exact = dh.analyze(model, batch, mode="exact").stable_rank
    sweeps = []
    for rtol in (0.2, 0.01):
        found = dh.analyze(model, batch, mode="probes", rtol=rtol)
        assert abs(found.stable_rank / exact - 1).max() < 4 * rtol
        fixed = dh.analyze(model, batch, mode="probes", probes=8, stable_rank=False).facts["sweeps"]
        sweeps.append(found.facts["sweeps"] - fixed)
    assert sweeps[0] < sweeps[1]


def test_stable_rank_is_a_flag() -> None:
    with pytest.raises(OptionError, match="stable_rank='no'"):
        dh.analyze(*_wide(), stable_rank="no")


def test_the_command_line_leaves_them_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "mlp", "--batch", "4", "--mode", "probes", "--probes", "2", "--no-stable-rank"]) == 0
    assert "stable rank" not in capsys.readouterr().out
