"""Attention in the forms in which models write it: one node in a sweep, whose products are those of double-backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.ir import ops
from dag_hesse.kernels.arena import SYSTEM
from dag_hesse.plan import fuse
from dag_hesse.rules import RULES
from tests import device
from tests.oracle import Truth, error
from tests.rules.test_opaque import call_of

BATCH, LENGTH, HEADS, WIDTH = 2, 5, 2, 4
sdpa = F.scaled_dot_product_attention
Form = Callable[["Model", Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Heads of one projection, and what is read off them; ``bias`` is a learned one."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form, self.weights = form, nn.Identity()
        self.inputs, self.outputs = nn.Linear(6, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 3)
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).view(BATCH, LENGTH, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        return self.outputs(self.form(self, q, k, v).transpose(1, 2).flatten(2)).tanh().mean(1)


def mask() -> Tensor:
    """Every sample has keys of its own; the last query of the second has none."""
    seen = torch.arange(LENGTH).repeat(BATCH, 1, LENGTH, 1) >= torch.arange(BATCH).view(-1, 1, 1, 1)
    seen[1, :, -1] = False
    return seen.to(device.NAME)


def by_hand(fill: float) -> Form:
    def form(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.mT / 2).masked_fill(later, fill)
        return model.weights(F.dropout(scores.softmax(-1), 0.3)) @ v

    return form


FUSED: dict[str, Form] = {
    "plain": lambda m, q, k, v: sdpa(q, k, v),
    "causal": lambda m, q, k, v: sdpa(q, k, v, is_causal=True),
    "mask": lambda m, q, k, v: sdpa(q, k, v, mask(), scale=0.7),
    "bias": lambda m, q, k, v: sdpa(q, k, v, torch.linspace(-1, 2, LENGTH**2).view(LENGTH, -1).to(q)),
    "dropout": lambda m, q, k, v: sdpa(q, k, v, dropout_p=0.4),
    "grouped heads": lambda m, q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True),
    "other values": lambda m, q, k, v: sdpa(q, k[:, :, :3], v[:, :, :3]),
    "by hand": by_hand(-torch.inf),
    "by hand, with a large number": by_hand(-3.0),
    "fixed keys": lambda m, q, k, v: sdpa(q, k.detach(), v),
}
APART: dict[str, Form] = {
    "learned bias": lambda m, q, k, v: sdpa(q, k, v, m.bias),
    "weights used twice": lambda m, q, k, v: (w := (q @ k.mT).softmax(-1)) @ v + w.square().sum(-1, keepdim=True),
    "along the queries": lambda m, q, k, v: (q @ k.mT).softmax(-2) @ v,
    "bias before the scale": lambda m, q, k, v: ((q @ k.mT + m.bias.detach()) * 2).softmax(-1) @ v,
    "filled before the bias": lambda m, q, k, v: (
        ((q @ k.mT).masked_fill(~mask(), -2.0) + m.bias.detach()).softmax(-1) @ v
    ),
    "biases of groups": lambda m, q, k, v: (
        ((q @ k.mT).unflatten(1, (BATCH, 1)) + m.bias[:, None].detach()).flatten(1, 2).softmax(-1) @ v
    ),
    "drops of groups": lambda m, q, k, v: (
        ((q @ k.mT).softmax(-1).unflatten(1, (BATCH, 1)) * m.bias[:, None].detach()).flatten(1, 2) @ v
    ),
    "softmax to a power": lambda m, q, k, v: (q @ k.mT).softmax(-1) ** 2 @ v,
}


def nodes_of_attention(graph: dh.CurvatureGraph) -> int:
    return sum(node.op == "dag_hesse.attention.default" for node in fuse(graph).nodes)


@pytest.mark.parametrize("name", [*FUSED, *APART])
def test_products_are_those_of_double_backward(name: str) -> None:
    torch.manual_seed(0)
    model = Model((FUSED | APART)[name]).double().to(device.NAME)
    x, y = torch.randn(BATCH, LENGTH, 6).double().to(device.NAME), torch.tensor([0, 2], device=device.NAME)
    points = ["inputs", "outputs.weight", "inputs.weight"] + (["bias"] if name == "learned bias" else [])
    state = device.random_states()
    graph = dh.capture(model, (x, y), loss=F.cross_entropy, points=points)
    assert nodes_of_attention(graph) == (name in FUSED)
    device.set_random_states(state)
    operator = dh.HessianOperator(model, (x, y), loss=F.cross_entropy, points=points, space="activation")
    gn, tensor = operator.parts(torch.eye(operator.shape[0], dtype=operator.dtype, device=device.NAME))
    device.set_random_states(state)
    truth = Truth(model, lambda: F.cross_entropy(model(x), y), ["inputs"], points[1:])
    places = dict(zip(operator.names, torch.arange(operator.shape[0]).split(operator.form.sizes), strict=True))
    for part, found in (("gn", gn), ("full", gn + tensor)):
        for v, rows in places.items():
            for w, columns in places.items():
                expected = truth.block(v, w, part, "shared")
                assert error(found[rows][:, columns], expected, 1e-2) < 1e-11, (part, v, w)


def test_weights_that_are_a_point_stay_a_node() -> None:
    torch.manual_seed(0)
    model = Model(by_hand(-torch.inf)).eval()
    batch = torch.randn(BATCH, LENGTH, 6), torch.tensor([0, 2])
    assert nodes_of_attention(dh.capture(model, batch, points=["weights", "inputs"])) == 0
    assert nodes_of_attention(dh.capture(model, batch, points=["inputs"])) == 1


@pytest.mark.parametrize("length", [40, 600])
def test_values_are_the_models_own_to_the_bit(length: int) -> None:
    torch.manual_seed(0)
    q, v = (torch.randn(6, length, 16, device=device.NAME) for _ in range(2))
    k, later = torch.randn(6, 16, length, device=device.NAME), torch.full((length, length), -torch.inf).triu(1).to(q)
    call = call_of(ops.attention, q, k, v, later, None, None, [2, 3], 0.25, 0.0, 1.0, True)
    assert torch.equal(RULES[call.node.op].run(call.node, call.values, SYSTEM), call.value)
