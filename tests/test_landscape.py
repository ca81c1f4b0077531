"""Slices of the loss, against the loss evaluated by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

import dag_hesse as dh
from dag_hesse import errors


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 3)).double()


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(9) % 3


def _by_hand(model: nn.Module, move: Tensor, batch: tuple[Tensor, Tensor]) -> float:
    moved = copy.deepcopy(model)
    vector_to_parameters(parameters_to_vector(moved.parameters()) + move, moved.parameters())
    return float(F.cross_entropy(moved(batch[0]), batch[1]).detach())


@pytest.mark.parametrize("training", [False, True])
def test_a_line_and_a_plane(training: bool) -> None:
    model, batch = _net().train(training), _batch()
    H = dh.HessianOperator(model, batch)
    first, second = H.top_eigenvectors(2)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    versions = [p._version for p in model.parameters()]
    line = H.landscape(first, span=0.5, points=5)
    flat = torch.cat([x.reshape(-1) for x in first.vector.values()])
    assert line.steps.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    expected = [_by_hand(model, step * flat, batch) for step in line.steps]
    assert np.allclose(line.losses, expected, rtol=1e-12)
    assert line.losses[2] == pytest.approx(H.loss, rel=1e-12)
    assert line.curvature[0] == pytest.approx(first.value, rel=1e-5)
    assert line.slope[0] == pytest.approx(float(H.gradient @ flat), rel=1e-10)
    small = H.landscape(first, span=1e-3, points=3)
    assert np.abs(small.losses - small.predicted).max() < 1e-7 < np.abs(small.losses - small.losses[1]).max()
    plane = H.landscape([first, second.vector], span=0.5, points=3)
    other = torch.cat([x.reshape(-1) for x in second.vector.values()])
    for i, s in enumerate(plane.steps):
        for j, t in enumerate(plane.steps):
            assert plane.losses[i, j] == pytest.approx(_by_hand(model, s * flat + t * other, batch), rel=1e-12)
            x = s * flat + t * other
            second_order = H.loss + float(H.gradient @ x) + 0.5 * float(x @ (H @ x))
            assert plane.predicted[i, j] == pytest.approx(second_order, rel=1e-9)
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions and torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(H @ flat, H @ flat)  # nothing counts as changed
    assert "curvature" in str(plane) and plane.directions[0].keys() == first.vector.keys()


def test_batches_groups_precision_and_dropout(tmp_path: Path) -> None:
    model, (x, y) = _net().eval(), _batch()
    d = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(2)).double()
    expected = [_by_hand(model, step * d, (x, y)) for step in (-0.1, 0.0, 0.1)]
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    for options in ({}, {"memory": 1}):
        found = dh.HessianOperator(model, loader, **options).landscape(d, span=0.1, points=3)  # type: ignore[arg-type]
        assert np.allclose(found.losses, expected, rtol=1e-12)
    grouped = dh.HessianOperator(model, (x, y), points=["0", "1", "3"])
    assert np.allclose(grouped.landscape(d, span=0.1, points=3).losses, expected, rtol=1e-12)
    single = copy.deepcopy(model).float()
    wide = dh.HessianOperator(single, (x.float(), y), float64=True).landscape(d, span=0.1, points=3)
    assert np.abs(wide.losses - expected).max() < 1e-6
    noisy = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    H = dh.HessianOperator(noisy, (x, y))
    found = H.landscape(span=1e-3, points=3)  # the masks of the operator
    assert found.losses[1] == pytest.approx(H.loss, rel=1e-12)
    assert np.abs(found.losses - found.predicted).max() < 1e-6
    assert (
        type(found.plot(tmp_path / "line.svg")).__name__ == "Figure" and (tmp_path / "line.svg").stat().st_size > 1000
    )
    assert H.landscape(H.top_eigenvectors(2), points=3).plot().axes


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda H: H.landscape(torch.ones(3).double()), errors.VectorError, r"shape \(3,\)"),
        (lambda H: H.landscape(span=0), errors.OptionError, "span=0"),
        (lambda H: H.landscape(span="wide"), errors.OptionError, "span='wide'"),
        (lambda H: H.landscape(points=2), errors.OptionError, "points=2"),
        (lambda H: H.landscape(H.top_eigenvectors(3)), errors.OptionError, "3 of them"),
        (lambda H: H.landscape("top"), errors.OptionError, "expected one vector or eigenpair"),
        (lambda H: H.landscape(torch.ones(H.shape[0], 2).double()), errors.OptionError, "2 columns"),
        (lambda H: H.landscape(direction=None), errors.UnknownOptionError, "'directions'"),
    ],
)
def test_what_is_no_slice(call: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        call(dh.HessianOperator(_net(), _batch()))


def test_operators_without_one() -> None:
    with pytest.raises(errors.OptionError, match="Fisher operator has no loss"):
        dh.FisherOperator(_net(), _batch()).landscape()
    with pytest.raises(errors.OptionError, match="space='parameter'"):
        dh.HessianOperator(_net(), _batch(), space="activation").landscape()
