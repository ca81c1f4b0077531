"""Ranks against dense blocks; bounds where they are proved; Remark 60 where it is false."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.errors import BatchCouplingError
from tests.theory.models import CLASSES, batch, chain, residual, truth


@pytest.mark.parametrize("make", [chain, residual])
def test_ranks_against_dense_blocks(make) -> None:
    torch.manual_seed(0)
    model, data = make(), batch(samples=4)
    names = ["1", "3"] if make is chain else ["0", "1"]
    found, expected = dh.theory.interaction_ranks(model, data, points=names), truth(model, data, names)
    for i, v in enumerate(names):
        for j, w in enumerate(names):
            for part in ("full", "gn"):
                for mode, ours in (("per_sample", found.per_sample), ("shared", found.mean)):
                    values = torch.linalg.svdvals(expected.block(v, w, part, mode, 4)).numpy()
                    np.testing.assert_allclose(ours[part].effective[i, j], values.sum(-1) / values.max(-1), rtol=1e-7)
                    stable = (values**2).sum(-1) / values.max(-1) ** 2
                    np.testing.assert_allclose(ours[part].stable_rank[i, j], stable, rtol=1e-7)
                    rank = (values > 1e-11 * values.max(-1, keepdims=True)).sum(-1)
                    np.testing.assert_array_equal(ours[part].rank[i, j], rank)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_bounds_and_order(width: int) -> None:
    """rank ≤ bound, and D ≤ d_eff ≤ √(rank D), through a bottleneck of this width."""
    torch.manual_seed(1)
    layers = (
        nn.Linear(4, 5),
        nn.Tanh(),
        nn.Linear(5, width),
        nn.Tanh(),
        nn.Linear(width, 5),
        nn.Tanh(),
        nn.Linear(5, CLASSES),
    )
    found = dh.theory.interaction_ranks(nn.Sequential(*layers).double(), batch(samples=4), points=["1", "5"])
    assert found.bound[0, 0] == min(width, CLASSES - 1)
    assert (found.per_sample["gn"].rank <= found.bound[:, :, None]).all()
    assert (found.mean["gn"].rank <= found.mean_bound).all()
    for spectra in (*found.per_sample.values(), *found.mean.values()):
        some = ~np.isnan(spectra.effective)
        d, effective, rank = (x[some] for x in (spectra.stable_rank, spectra.effective, spectra.rank))
        assert (d <= effective + 1e-9).all() and (effective <= np.sqrt(rank * d) + 1e-9).all()


def test_remark_60_is_false_beyond_one_samples_gn_part() -> None:
    """Two classes: K − 1 = 1. The mean of GN blocks has a larger D, and so has one sample's H with its tensor part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = batch(samples=8)
    found = dh.theory.interaction_ranks(model, (x, y % 2), points=["0", "2"])
    assert (found.bound[:2, :2] == 1).all()
    np.testing.assert_allclose(found.per_sample["gn"].stable_rank[0, 0], 1.0)
    assert found.mean["gn"].stable_rank[0, 0] > 1.0 + 1e-6
    assert found.per_sample["full"].stable_rank[0, 0].max() > 1.0 + 1e-6
    assert "d_eff" in str(found)


def test_refusals() -> None:
    coupled = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(BatchCouplingError):
        dh.theory.interaction_ranks(coupled, batch(), points="0")
