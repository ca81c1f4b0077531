"""Models that compute in half precision by autocast: every node has the type that it had in the forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.rules.table import evaluate
from dag_hesse.sweep.linearize import leaf_values
from tests.oracle import error


class Mixed(nn.Module):
    """A body under autocast of its own, between layers that are not."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Conv2d(3, 4, 3, padding=1), body, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype is torch.float32):
            y = self.body(torch.tanh(self.first(x)))
            y = self.last(y.flatten(2).mean(2))
        return y.to(x.dtype)


class Rows(nn.Module):
    """A layer on (batch, places, channels)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).mT).mT


BODIES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Rows(nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4))),
    "layer norm": lambda: Rows(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))),
    "RMS norm": lambda: Rows(nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 4))),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1)),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm2d(4).eval(), nn.SiLU(), nn.Conv2d(4, 4, 1)),
    "batch norm in training": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1)),
    "encoder": lambda: Rows(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)),
    "softmax and power": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Softmax(1), nn.GELU()),
}


def mixed(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Mixed(BODIES[name]()), (torch.randn(5, 3, 4, 4), torch.arange(5) % 3)


def by_double_backward(model: nn.Module, batch: tuple[Tensor, Tensor], v: Tensor) -> Tensor:
    own = list(model.parameters())
    pieces = [x.reshape(p.shape) for x, p in zip(v.split([p.numel() for p in own]), own, strict=True)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), own, create_graph=True)
    return torch.cat([x.flatten() for x in torch.autograd.grad(first, own, pieces)])


@pytest.mark.parametrize("name", BODIES)
def test_nodes_have_the_types_of_the_forward(name: str) -> None:
    model, batch = mixed(name)
    graph = dh.capture(model, batch)
    values = leaf_values(graph, model, list(batch))
    for node in graph.nodes:
        if node.index not in values:
            values[node.index] = evaluate(node, tuple(values[k] for k in node.inputs))[1]
        assert values[node.index].dtype == node.dtype, node.where
    assert torch.bfloat16 in {node.dtype for node in graph.nodes}


@pytest.mark.parametrize("name", BODIES)
def test_products_are_as_right_as_those_of_double_backward(name: str) -> None:
    model, batch = mixed(name)
    H = dh.HessianOperator(model, batch)
    v = torch.randn(H.shape[1])
    found, half = H @ v, by_double_backward(model, batch, v)
    wide = by_double_backward(model.double(), (batch[0].double(), batch[1]), v.double())
    assert error(found, half.double()) < 2e-2  # of bfloat16, whose rounding is 4e-3
    assert error(found, wide) < 1.5 * error(half, wide)
    assert found.dtype is torch.float32


def test_a_capture_under_autocast_neither_uses_its_cache_nor_fills_it() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (torch.randn(5, 4), torch.arange(5) % 3)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(batch[0]), batch[1])  # casts of the weights are in the cache now
        H = dh.HessianOperator(model, batch)
        found = H @ v
        assert torch.is_autocast_cache_enabled()
        loss.backward()
        half = by_double_backward(model, batch, v)
    assert error(found, half.double()) < 2e-2
