"""What rows state beside their derivatives, against what the ops do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dag_hesse._capture.batch_axis import FREE
from dag_hesse._capture.dependence import NONE, State, separate
from dag_hesse._capture.families import FOLLOW
from dag_hesse.ir import BatchAxis, Interaction, Kind, Node
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
    x, out = call.values[0], call.value
    if name not in OURS and name.startswith("aten."):
        views = lies_in(execute(call.node, call.values), x) and x.numel() > 0
        said = Moves.VIEW in moves or name == "aten.alias.default"  # a copy here, as its user may write to it
        assert views == said, f"{name}: the result lies in its input's memory: {views}; the row says {moves}"
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
    assert not RULES[name].pairs(call.node), f"{name} is said to be linear and has second derivatives"

    def at(scale: float) -> Tensor:
        return execute(call.node, [scale * v if on else v for v, on in zip(call.values, call.active, strict=True)])

    assert error(at(3.0) - at(2.0), at(2.0) - at(1.0), 1e-3) < 1e-12


@pytest.mark.parametrize("name, sample", ROWS)
def test_what_is_linear_in_pieces_has_no_second_derivative(name: str, sample: Sample) -> None:
    pairs = RULES[name].pairs(make_call(name, sample).node)
    flat = RULES[name].kind in (Kind.STRUCTURAL, Kind.GATHER, Kind.PIECEWISE_LINEAR)
    assert not (flat and pairs), f"{name} is {RULES[name].kind.value} and states pairs {sorted(pairs)}"


class Alone:
    """Stands for the walk over a graph whose first input has its samples along an axis, and no other has any."""

    def __init__(self, call: Call, axis: int) -> None:
        self.size = call.shape()[axis]
        self.states = [separate(BatchAxis(axis, 1, self.size, 1)), *[NONE] * (len(call.values) - 1)]
        self.graph, self.constants, self.call = self, self, call
        self.nodes = [leaf(x) for x in call.values]

    def shape(self, k: int) -> tuple[int, ...]:
        return tuple(self.call.shape(k))

    def value(self, k: int) -> Tensor:
        return self.call.values[k]

    def line(self, k: int, axis: int) -> Tensor:
        batch_axis = self.states[k].batch_axis
        return batch_axis.line() if batch_axis else torch.full((self.shape(k)[axis],), FREE)


def leaf(x: Tensor) -> Node:
    return Node(0, "leaf", None, (), {}, (), tuple(x.shape), x.dtype, Kind.CONST)


@pytest.mark.parametrize("name, sample", [row for row in ROWS if RULES[row.values[0]].samples is not Samples.UNKNOWN])
def test_a_result_depends_on_samples_as_is_said(name: str, sample: Sample) -> None:
    torch.manual_seed(3)
    call = make_call(name, sample)
    for axis in [k for k, n in enumerate(call.shape()) if n > 1 and call.values[0].is_floating_point()]:
        node = replace(call.node, inputs=tuple(range(len(call.values))))
        state = FOLLOW[RULES[name].samples](Alone(call, axis), node)  # type: ignore[arg-type]
        what, count = f"{name}, axis {axis}", call.shape()[axis]
        if state.interaction is Interaction.SEPARATE:
            for b in range(count):
                check_owners(state, b, _moved(call, axis, [b]) != call.value, what)
        elif state.interaction is Interaction.SUMMED and call.value.is_floating_point():
            alone = sum(_moved(call, axis, [b]) - call.value for b in range(count))
            together = _moved(call, axis, list(range(count))) - call.value
            assert error(together, alone, 1e-6) < 1e-9, f"{what}: the result is no sum over samples"
        elif state.interaction is Interaction.NONE:
            every = list(range(count))
            assert torch.equal(_moved(call, axis, every), call.value), f"{what}: the result depends on samples"
        # else they are taken to interact, which is always safe


def _moved(call: Call, axis: int, samples: list[int]) -> Tensor:
    """The result where some samples have other values."""
    x = call.values[0].clone()
    for b in samples:
        x.select(axis, b).mul_(0.97).add_(0.003)
    return execute(call.node, [x, *call.values[1:]])


def check_owners(state: State, b: int, changed: Tensor, what: str) -> None:
    moved = changed.nonzero()
    if state.batch_axis is None:
        assert b == state.one or not len(moved), f"{what}: all is said to be of sample {state.one}"
        return
    owners = state.batch_axis.line()[moved[:, state.batch_axis.axis]] if len(moved) else torch.tensor([b])
    assert bool((owners == b).all()), f"{what}: sample {b} moves slices of others"


@pytest.mark.parametrize(
    "name, wrong, said",
    [
        ("aten.roll.default", Samples.ELEMENTWISE, "moves slices of others"),
        ("aten.logsumexp.default", Samples.SUM, "no sum over samples"),
        ("aten.exp.default", Samples.CREATED, "depends on samples"),
    ],
)
def test_a_wrong_way_of_the_samples_is_found(
    name: str, wrong: Samples, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, name, replace(RULES[name], samples=wrong))
    with pytest.raises(AssertionError, match=said):
        for row in ROWS:
            if row.values[0] == name:
                test_a_result_depends_on_samples_as_is_said(*row.values)


def _shifted(call: Call, position: int) -> Tensor:
    axis = call.node.args[position]
    rows = torch.randn_like(call.values[0].select(axis, 0)).unsqueeze(axis)
    return execute(call.node, [call.values[0] + rows, *call.values[1:]])


@pytest.mark.parametrize("name, sample", [row for row in ROWS if RULES[row.values[0]].shifted is not None])
def test_a_constant_along_an_axis_makes_no_difference(name: str, sample: Sample) -> None:
    torch.manual_seed(2)
    call, position = make_call(name, sample), RULES[name].shifted
    assert position is not None
    assert error(_shifted(call, position), call.value, 1e-3) < 1e-12


def test_every_way_of_the_batch_axis_is_followed() -> None:
    assert set(FOLLOW) == set(Samples)
