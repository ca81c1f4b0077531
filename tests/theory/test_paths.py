"""Sums over paths are the blocks; the strongest are found; edges that are cut carry what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.errors import OptionError, PointError
from dag_hesse.theory import path_search
from tests.theory.models import batch, chain, residual, truth

POINTS = ["0", "1.act", "1", "2.act", "2"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return residual(depth=3)


def test_paths_add_up_to_the_block(model: nn.Module) -> None:
    data = batch()
    expected = truth(model, data, POINTS)
    for v, w, pairs in (("0", "0", 16), ("0", "1.act", 8), ("1", "2", 2), ("2", "2", 1)):
        found = dh.theory.block_paths(model, data, v, w, points=POINTS)
        block = expected.block(v, w, "gn", "shared")
        assert found.pairs == len(found.terms) == pairs
        assert found.defect < 1e-12
        torch.testing.assert_close(found.block, block)
        torch.testing.assert_close(sum(term.influence for term in found.terms), block)
        assert sum(term.share for term in found.terms) == pytest.approx(1.0)
        assert found.total_resonance >= float(block.norm()) * (1 - 1e-12)  # Corollary 67
        sizes = [term.resonance for term in found.terms]
        assert sizes == sorted(sizes, reverse=True)


def test_where_there_are_too_many_pairs_the_strongest_are_taken(model: nn.Module) -> None:
    found = dh.theory.block_paths(model, batch(), "0", "0", points=POINTS, most=9)
    rest = found.block - sum(term.influence for term in found.terms)
    assert len(found.terms) == 9 and found.pairs == 16
    assert found.defect == pytest.approx(float(rest.norm() / found.block.norm()))
    assert "9 of 16 pairs" in str(found)


def test_strongest_paths(model: nn.Module) -> None:
    data = batch()
    every = dh.theory.strongest_paths(model, data, "0", points=POINTS, k=100)
    assert every.count == len(every.terms) == 4 and every.proved
    assert sum(term.share for term in every.terms) == pytest.approx(1.0)
    strengths = [term.strength for term in every.terms]
    assert strengths == sorted(strengths, reverse=True)
    some = dh.theory.strongest_paths(model, data, "0", "out", points=POINTS, k=2)
    assert some.terms == every.terms[:2] and "2 of 4 paths" in str(some)
    assert ("0", "1", "2", "output") in [term.path for term in every.terms]


def test_a_search_that_is_cut_short_says_so(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_search, "_EXPANDED", 3)
    found = dh.theory.strongest_paths(model, batch(), "0", points=POINTS)
    assert not found.proved and "cut short" in str(found)


def test_equation_11_counts_too_much() -> None:
    """Summed over all common descendants, as it is written, a chain's block comes out several times."""
    torch.manual_seed(0)
    model, data = chain(depth=3), batch(samples=1)
    names = ["1", "3", "5"]
    expected = truth(model, data, names)
    block = expected.block("1", "1", "gn", "shared")
    found = dh.theory.block_paths(model, data, "1", "1", points=names)
    torch.testing.assert_close(found.block, block)
    literal = torch.zeros_like(block)
    for c, (start, stop) in {"3": (2, 4), "5": (2, 6)}.items():
        at = model[:start](data[0]).detach()[0]
        down = torch.autograd.functional.jacobian(model[start:stop], at)
        literal += down.T @ expected.block(c, c, "gn", "shared") @ down
    torch.testing.assert_close(literal, 2.0 * block)


def test_cut_skip_connection(model: nn.Module) -> None:
    """Without both skip edges, only the branches carry; the oracle detaches x in x + act(linear(x))."""
    data = batch()
    found = dh.theory.cut_edges(model, data, "0", "0", [("0", "1"), ("1", "2")], points=POINTS)
    x = data[0]

    def out(z: torch.Tensor) -> torch.Tensor:
        for block in model[1:3]:
            z = z.detach() + block.act(block.linear(z))
        return model[3](z)

    expected = torch.zeros(4, 4).double()
    for k in range(len(x)):
        z = model[0](x[k]).detach()
        j = torch.autograd.functional.jacobian(out, z)
        p = out(z).softmax(-1).detach()
        expected += j.T @ (p.diag() - p.outer(p)) @ j / len(x)
    torch.testing.assert_close(found.without, expected)
    torch.testing.assert_close(found.carried, found.block - expected)
    assert "carried" in str(found)


def test_cutting_every_way_leaves_nothing(model: nn.Module) -> None:
    found = dh.theory.cut_edges(model, batch(), "0", "2", [("2", "out")], points=POINTS)
    assert not found.without.any() and found.share == pytest.approx(1.0)


def test_several_batches_are_one_loss(model: nn.Module) -> None:
    x, y = batch(samples=5)
    whole = dh.theory.block_paths(model, (x, y), "0", "1", points=POINTS)
    parts = dh.theory.block_paths(model, [(x[:2], y[:2]), (x[2:], y[2:])], "0", "1", points=POINTS)
    torch.testing.assert_close(parts.block, whole.block)
    np.testing.assert_allclose(parts.total_resonance, whole.total_resonance)


def test_refusals(model: nn.Module) -> None:
    data = batch()
    with pytest.raises(PointError, match="no path leads from '2' to '0'"):
        dh.theory.strongest_paths(model, data, "2", "0", points=POINTS)
    with pytest.raises(PointError, match="no edge leads from '0' to '2'"):
        dh.theory.cut_edges(model, data, "0", "0", [("0", "2")], points=POINTS)
    with pytest.raises(PointError, match="is no edge"):
        dh.theory.cut_edges(model, data, "0", "0", ["0"], points=POINTS)
    with pytest.raises(OptionError, match="k=0"):
        dh.theory.strongest_paths(model, data, "0", k=0)
    for end in (np.ones(3), torch.ones(3), None, dict):
        for call in (dh.theory.block_paths, dh.theory.strongest_paths):
            with pytest.raises(PointError, match="is not in the points"):
                call(model, data, end, "2", points=POINTS)
        with pytest.raises(PointError, match="is not in the points"):
            dh.theory.cut_edges(model, data, "0", "2", [(end, "2")], points=POINTS)
