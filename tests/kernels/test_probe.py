"""Random signs are the same in whatever pieces they are drawn, and look random."""

from __future__ import annotations

import torch

from dag_hesse.kernels.arena import SYSTEM
from dag_hesse.kernels.probe import signs

LIKE = torch.empty(0)


def test_a_probe_is_the_same_in_whatever_chunk_it_is_drawn() -> None:
    whole = signs(SYSTEM, 11, 0, (5, 2, 70), LIKE)
    pieces = [signs(SYSTEM, 11, first, (count, 2, 70), LIKE) for first, count in ((0, 2), (2, 1), (3, 2))]
    assert torch.equal(whole, torch.cat(pieces))
    assert torch.equal(whole.double(), signs(SYSTEM, 11, 0, (5, 2, 70), LIKE.double()))


def test_signs_are_balanced_and_independent() -> None:
    drawn = torch.stack([signs(SYSTEM, key, 0, (64, 1, 4096), LIKE)[:, 0] for key in (0, 1, 1_000_003)])
    assert drawn.abs().eq(1).all()
    flat = drawn.flatten(0, 1)
    off = (flat @ flat.mT).fill_diagonal_(0) / 4096**0.5  # normal, where probes are independent
    assert float(off.abs().max()) < 6 and abs(float(off.square().mean()) - 1) < 0.05
    assert abs(float(flat.mean(1).square().mean()) * 4096 - 1) < 0.3
    assert abs(float(flat.mean(0).square().mean()) * len(flat) - 1) < 0.1
