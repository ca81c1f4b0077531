"""The pool: blocks never overlap, come back when nobody holds them, and products over it are the same."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dag_hesse as dh
from dag_hesse.kernels import arena as arena_module
from dag_hesse.kernels.arena import SYSTEM, Pool

LIKE = torch.zeros(1)


@given(st.lists(st.tuples(st.integers(0, 400_000), st.booleans(), st.integers(0, 30)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_two_tensors_share_memory(steps: list[tuple[int, bool, int]]) -> None:
    pool, alive = Pool(), dict[int, torch.Tensor]()
    for mark, (size, drop, which) in enumerate(steps):
        alive[mark] = pool.lent(size).fill_(mark)
        if drop and alive:
            alive.pop(sorted(alive)[which % len(alive)])
    assert all((tensor == mark).all() and tensor.data_ptr() % 64 == 0 for mark, tensor in alive.items())
    alive.clear()
    pool._collect()
    assert all(slab.gaps == [(0, slab.size)] for slab in pool._slabs)  # neighbours were joined again


def test_a_view_keeps_its_memory() -> None:
    pool = Pool()
    view = pool.empty(LIKE, 1 << 23)[7:9]
    view.fill_(3.0)
    gc.collect()
    assert pool.empty(LIKE, 1 << 23).fill_(0.0).data_ptr() != view.data_ptr()
    assert view.tolist() == [3.0, 3.0]


def test_results_outlive_the_pool() -> None:
    pool = Pool()
    x = pool.empty(LIKE, 1 << 23).fill_(2.0)
    del pool
    gc.collect()
    assert float(x.sum()) == 2.0 * (1 << 23)


def test_room_keeps_the_layout_and_knows_where_there_is_none() -> None:
    x = torch.empty(1, 8, 1 << 12, 1 << 8, memory_format=torch.channels_last)
    pool = Pool()
    assert SYSTEM.room(x) is None  # PyTorch finds the place
    place = pool.room(x, torch.zeros(1, 8, 1, 1), 2.0)
    assert place is not None
    assert (place.shape, place.stride()) == (x.shape, x.stride())
    assert pool.room(x[..., :1], x) is None  # the result would be larger
    assert pool.room(x[:, :4]) is None  # its elements do not fill what they span
    assert pool.room(torch.zeros(3)) is None


@pytest.mark.parametrize("space", ["parameter", "activation"])
def test_products_are_the_same(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 3),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3),
    ).double().eval()  # fmt: skip
    H = dh.HessianOperator(net, (torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 0])), space=space)
    v = torch.randn(H.shape[0], 3).double()
    monkeypatch.setattr(arena_module, "_LARGE", 0)
    pooled = [H @ v for _ in range(3)]
    assert H._problem.arena.size > 0
    monkeypatch.setattr(arena_module, "_LARGE", 1 << 60)
    assert all(torch.equal(x, pooled[0]) for x in pooled)
    torch.testing.assert_close(pooled[0], H @ v, rtol=1e-12, atol=1e-14)


def test_blocks_multiply_in_the_operators_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    H = dh.HessianOperator(net, (torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])))
    monkeypatch.setattr(arena_module, "_LARGE", 0)
    before = H._problem.arena.size
    product = H.block("0.weight", "2.weight") @ torch.ones(8).double()
    assert product.shape == (12,)
    assert H._problem.arena.size > before
