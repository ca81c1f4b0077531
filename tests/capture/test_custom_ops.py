"""Custom ops of a library: nodes of their own, OPAQUE until a row says more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse._capture import lower
from dag_hesse.errors import CaptureError
from dag_hesse.ir import Kind
from dag_hesse.rules import RULES, lowering
from dag_hesse.rules.elementwise import smooth
from tests import device
from tests.oracle import error


@torch.library.custom_op("dag_hesse_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x * x * x


cube.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
NAME = "dag_hesse_tests.cube.default"


class Cubes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(cube(self.first(x)))


@pytest.mark.parametrize("kind", [Kind.OPAQUE, Kind.SMOOTH])
def test_a_custom_op_is_a_node_that_may_have_a_row(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is Kind.SMOOTH:
        row = smooth(lambda c: 3 * c.values[0] ** 2, lambda c: 6 * c.values[0])
        monkeypatch.setitem(RULES, NAME, row)
    model = Cubes().double().to(device.NAME)
    batch = torch.randn(5, 3).double().to(device.NAME), torch.tensor([0, 1, 1, 0, 1], device=device.NAME)
    node = next(node for node in dh.capture(model, batch).nodes if node.op == NAME)
    assert node.kind is kind
    H = dh.HessianOperator(model, batch)
    v = torch.randn(H.shape[0]).double().to(device.NAME)
    own = list(model.parameters())
    slope = torch.autograd.grad(nn.functional.cross_entropy(model(batch[0]), batch[1]), own, create_graph=True)
    flat = torch.cat([g.flatten() for g in slope])
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(flat @ v, own)])
    assert error(H @ v, expected) < 1e-10


def test_a_custom_op_may_have_a_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    op = torch.ops.dag_hesse_tests.cube.default
    theirs = lowering.decompositions()
    monkeypatch.setattr(lowering, "decompositions", lambda: {**theirs, op: lambda x: x * x * x})
    monkeypatch.setattr(lower, "_RECIPES", {})
    model = Cubes().double().to(device.NAME)
    batch = torch.randn(5, 3).double().to(device.NAME), torch.tensor([0, 1, 1, 0, 1], device=device.NAME)
    graph = dh.capture(model, batch)
    assert not graph.opaque and NAME not in {node.op for node in graph.nodes}
    lowered = dh.HessianOperator(model, batch)
    v = torch.randn(lowered.shape[0]).double().to(device.NAME)
    monkeypatch.undo()
    assert error(lowered @ v, dh.HessianOperator(model, batch) @ v) < 1e-14
    monkeypatch.setattr(lowering, "decompositions", lambda: {**theirs, op: lambda x: x.item()})
    monkeypatch.setattr(lower, "_RECIPES", {})
    with pytest.raises(CaptureError, match=f"the lowering of {NAME} fails: "):
        dh.capture(model, batch)
