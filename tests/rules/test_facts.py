"""What rows state beside their derivatives, against what the ops do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dag_hesse._capture.families import FOLLOW
from dag_hesse.ir.node import execute
from dag_hesse.rules import RULES, Call
from dag_hesse.rules.base import Moves, Samples
from tests.oracle import error
from tests.rules.samples import Sample
from tests.rules.test_rules import ROWS, make_call

OURS = ("dag_hesse.tap.default", "dag_hesse.assigned.default")  # they are there to make copies


def lies_in(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


@pytest.mark.parametrize("name, sample", ROWS)
def test_movement_of_elements(name: str, sample: Sample) -> None:
    torch.manual_seed(0)
    call, moves = make_call(name, sample), RULES[name].moves
    x, out = call.values[0], call.out
    if name not in OURS and name.startswith("aten."):
        views = lies_in(execute(call.node, call.values), x) and x.numel() > 0
        assert views == (Moves.VIEW in moves) or (views and name == "aten.alias.default")
    if Moves.SAME in moves and out.shape == x.shape and name not in ("aten.expand.default", "aten.cat.default"):
        assert torch.equal(out, x)
    if Moves.ORDERED in moves:
        assert torch.equal(out.flatten(), x.flatten())


@pytest.mark.parametrize("name, sample", ROWS)
def test_linear_ops_are_linear_but_for_a_constant(name: str, sample: Sample) -> None:
    torch.manual_seed(1)
    call = make_call(name, sample)
    if not RULES[name].linear:
        return
    assert not RULES[name].pairs(call.node)

    def at(scale: float) -> Tensor:
        return execute(call.node, [scale * v if on else v for v, on in zip(call.values, call.active, strict=True)])

    assert error(at(3.0) - at(2.0), at(2.0) - at(1.0), 1e-3) < 1e-12


def _shifted(call: Call, position: int) -> Tensor:
    axis = call.node.args[position]
    rows = torch.randn_like(call.values[0].select(axis, 0)).unsqueeze(axis)
    return execute(call.node, [call.values[0] + rows, *call.values[1:]])


@pytest.mark.parametrize("name, sample", [row for row in ROWS if RULES[row.values[0]].shifted is not None])
def test_a_constant_along_an_axis_makes_no_difference(name: str, sample: Sample) -> None:
    torch.manual_seed(2)
    call, position = make_call(name, sample), RULES[name].shifted
    assert position is not None
    assert error(_shifted(call, position), call.out, 1e-3) < 1e-12


def test_every_way_of_the_batch_axis_is_followed() -> None:
    assert set(FOLLOW) == set(Samples)
