"""Fusion keeps the function, its points and every block; and it does fuse what it should."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse._capture import Batches
from dag_hesse.experiments.models import resnet18
from dag_hesse.ir import CurvatureGraph, Kind, verify
from dag_hesse.kernels import machine
from dag_hesse.plan import fuse
from dag_hesse.rules.region import Region
from dag_hesse.sweep import Problem, Request
from tests.models.zoo import CASES, case
from tests.oracle import error

LEAVES = (Kind.INPUT, Kind.PARAM, Kind.CONST)


def swept(graph: CurvatureGraph) -> int:
    """Nodes that a sweep from the points visits."""
    reached = graph.descendants(k for point in graph.points for k in point.sites)
    return sum(reached[node.index] and node.kind not in LEAVES for node in graph.nodes)


def regions(graph: CurvatureGraph) -> list[list[str]]:
    return [
        [m.op.split(".")[1] for m in node.target.members if m.kind is not Kind.CONST]
        for node in graph.nodes
        if isinstance(node.target, Region)
    ]


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU])
def test_resnet18_has_at_most_sixty_nodes_to_sweep(activation: type[nn.Module]) -> None:
    model = resnet18(activation=activation).eval()
    graph = dh.capture(model, (torch.randn(2, 3, 32, 32), torch.tensor([0, 1])))
    fused = fuse(graph)
    assert swept(fused) <= 60 < swept(graph)
    name = "silu" if activation is nn.SiLU else "relu"
    assert ["batch_affine", "batch_affine", "add", name] in [sorted(r, key=r.index) for r in regions(fused)]
    assert "region<batch_affine" in str(fused)


class Gated(nn.Module):
    """Elementwise code of every shape: a gate, a polynomial, a broadcast, an inner point, a value used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        h = torch.sigmoid(a) * b + self.gain * a * b - 0.3 * a**3
        h = dh.tap(h.tanh() * 2 + h, "inner")
        return self.c(torch.where(b.detach() > 0, h * 1.5, h.exp() / 3) * h)


@pytest.mark.parametrize("points", [["a", "b", "inner"], ["a", "c"], ["gain", "a.weight", "inner"]])
def test_fused_products_are_the_unfused_ones(points: list[str]) -> None:
    torch.manual_seed(0)
    model, batch = Gated().double(), (torch.randn(5, 3).double(), torch.randn(5, 2).double())
    graph = dh.capture(model, batch, points=points)
    fused = verify(fuse(graph))
    assert [p.name for p in fused.points] == [p.name for p in graph.points]
    assert swept(fused) < swept(graph)
    _same_products(model, batch, graph, fused)


class Reshaped(nn.Module):
    """Linear layers over two leading axes, an activation between them, a cache that starts empty."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(3, 4), nn.Linear(4, 2), nn.Parameter(torch.randn(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x.view(-1, 3)).view(-1, 2, 4)
        h = dh.tap(torch.nn.functional.gelu(h + self.gain), "inner")
        h = torch.cat([h.new_zeros(0), h.flatten()]).unflatten(0, (-1, 4))
        return self.b((h * h.sigmoid()).view(-1, 2, 4)[:, :2].expand(-1, 2, 4)).sum(1)


@pytest.mark.parametrize("points", [["a", "b"], ["a", "inner"], ["a.weight", "gain", "b.bias"]])
@pytest.mark.parametrize("size", [1, 3])
def test_data_movement_that_moves_nothing_goes(points: list[str], size: int) -> None:
    torch.manual_seed(0)
    model, batch = Reshaped().double(), (torch.randn(size, 2, 3).double(), torch.randn(size, 2).double())
    graph = dh.capture(model, batch, points=points)
    fused = verify(fuse(graph))
    ops = [node.op.split(".")[1] for node in fused.nodes if node.kind not in LEAVES and "." in node.op]
    assert not {"cat", "slice", "expand", "unflatten", "flatten"} & set(ops)
    if "inner" not in points:
        assert any(region[-4:] == ["add", "gelu", "sigmoid", "mul"] for region in regions(fused))
    assert ops.count("reshape") <= 2 + ("inner" in points)
    _same_products(model, batch, graph, fused)


def _same_products(model: nn.Module, batch: object, graph: CurvatureGraph, fused: CurvatureGraph) -> None:
    parsed = Batches(batch)
    every = tuple(range(len(graph.points)))
    plain, ours = (Problem(model, [g], parsed, "shared", with_out=False) for g in (graph, fused))
    requests = [Request({w: torch.randn(2, 1, plain.dim(w), dtype=plain.dtype)}, every) for w in every]
    for asked in ("both", "full", "gn", "tensor"):
        expected, found = (p.run(requests, parts=asked) for p in (plain, ours))
        # Where a product is zero in exact arithmetic, what matters is that it is small beside the others.
        parts = [x for r in expected for b in r.values() for x in (b.gn, b.tensor) if x is not None]
        scale = max((float(x.norm()) for x in parts), default=0.0)
        for theirs, own in zip(expected, found, strict=True):
            for v in every:
                for part in ("gn", "tensor"):
                    left, right = getattr(theirs[v], part), getattr(own[v], part)
                    zero = torch.zeros(2, 1, plain.dim(v), dtype=plain.dtype)
                    assert error(zero if right is None else right, zero if left is None else left, scale) < 1e-12


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_zoo_stays_well_formed_and_gets_smaller(name: str) -> None:
    one = case(name)
    graph = dh.capture(
        one.model, one.batch, loss=one.loss, output=one.out or None, points=[*one.names, *one.parameters]
    )
    fused = verify(fuse(graph))
    assert len(fused.nodes) < len(graph.nodes)
    assert [p.dim for p in fused.points] == [p.dim for p in graph.points]
    _same_products(one.model, one.batch, graph, fused)


@pytest.mark.parametrize("points", [["0", "2"], ["0.weight", "0.bias", "2.bias"], ["2"]])
def test_biases_join_the_products_they_are_added_to(points: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = (torch.randn(5, 3).double(), torch.randn(5, 2).double())
    graph = dh.capture(model, batch, points=points)
    fused = verify(fuse(graph))
    joined = [node for node in fused.nodes if node.op == "dag_hesse.mm_bias.default"]
    # What nothing that is seeded reaches stays as it is: it is evaluated once.
    assert len(joined) == {"0": 1, "0.weight": 2, "2": 0}[points[0]]
    _same_products(model, batch, graph, fused)


@pytest.mark.parametrize("operator", [dh.HessianOperator, dh.GGNOperator])
def test_a_linearization_leaves_nothing_nonlinear_for_the_sweeps(
    operator: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.CPU, "program", 0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, 2))
    H = operator(model.eval(), (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])))
    ((_, lin),) = H._problem.linearizations()
    found = [call for k, call in lin.calls.items() if lin.graph.nodes[k].op == "region"]
    assert len(found) >= 2
    # What the partials come of has been given up.
    assert all(getattr(call, "tail", None) is None and getattr(call, "fused", None) is None for call in found)


def _hardshrink_by_hand(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where((x - y).abs() < 0.4, (x - y) ** 2 / 2, (x - y).abs() - 0.5)


_DETACHED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "a detached square": lambda x, y: x + (x * x).detach() + x * y,
    "straight-through": lambda x, y: (y.tanh() + (y.tanh().round() - y.tanh()).detach()) * x,
    "Huber": _hardshrink_by_hand,
    "hardshrink": lambda x, y: torch.nn.functional.hardshrink(x, 0.3) * y,
    "softshrink": lambda x, y: torch.nn.functional.softshrink(x * y, 0.1),
    "a detached softmax": lambda x, y: (x * y).sin() * (1 - y.softmax(1)[:, :1].detach()),
    "a mask of both": lambda x, y: (x * y) ** 2 * (x.sigmoid() <= y.sigmoid()),
    "a detached point": lambda x, y: dh.tap(x * 2, "inner").detach() * x * y + dh.tap(x.exp(), "other").detach(),
    "logaddexp": torch.logaddexp,
    "clipped": lambda x, y: torch.min(x * y, (x.exp() / x.exp().detach()).clamp(0.8, 1.2) * y),
    "a masked mean": lambda x, y: (x * y * (x > 0)).sum() / (x > 0).sum().clamp(min=1) + x.sign() * y,
}


class Detaching(nn.Module):
    """Two linear layers of one input, and elementwise code of their outputs."""

    def __init__(self, code: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.code = nn.Linear(3, 4), nn.Linear(3, 4), code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self.a(x), self.b(x))


def _is_right(code: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], points: list[str]) -> None:
    """Products before and after fusion are one, and those in parameter space are those of double backward."""
    torch.manual_seed(0)
    model, batch = Detaching(code).double(), (torch.randn(2, 3).double(), torch.randn(2, 4).double())
    graph = dh.capture(model, batch, loss=lambda o, t: (o * t).sum(), points=points)
    _same_products(model, batch, graph, verify(fuse(graph)))
    parameters = list(model.parameters())
    slopes = torch.autograd.grad((model(batch[0]) * batch[1]).sum(), parameters, create_graph=True)
    flat = torch.cat([slope.flatten() for slope in slopes])
    rows = [torch.autograd.grad(s, parameters, retain_graph=True, materialize_grads=True) for s in flat]
    truth = torch.stack([torch.cat([x.flatten() for x in row]) for row in rows])
    found = dh.HessianOperator(model, batch, loss=lambda o, t: (o * t).sum()).dense()
    assert error(found, truth, 1e-3) < 1e-12


@pytest.mark.parametrize("name", _DETACHED)
@pytest.mark.parametrize("points", [["a", "b"], ["a"], ["b.weight"]])
def test_detached_values_stay_outside_of_regions(name: str, points: list[str]) -> None:
    _is_right(_DETACHED[name], points)


def _random_code(seed: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Elementwise code with detached values, the same whenever it is called."""

    def code(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        choose, values = random.Random(seed), [x, y]
        for _ in range(8):
            p, q = choose.choice(values), choose.choice(values)
            values.append(choose.choice(_MOVES)(p, q))
        return values[-1] + values[-2] * x + y * y * x

    return code


_MOVES: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda p, q: p + q,
    lambda p, q: p * q / 2,
    lambda p, q: p.tanh(),
    lambda p, q: p.detach(),
    lambda p, q: p * q.detach(),
    lambda p, q: torch.where(p > q, p, q * 2),
    lambda p, q: p * (q.sin() > 0.1),
    lambda p, q: p - q.sign(),
    lambda p, q: p.abs(),
    lambda p, q: p + (q.round() - q).detach(),
    lambda p, q: torch.maximum(p, q),
]


@pytest.mark.parametrize("seed", range(30))
def test_random_code_with_detached_values(seed: int) -> None:
    _is_right(_random_code(seed), [["a", "b"], ["a"], ["a.weight", "b.bias"]][seed % 3])
