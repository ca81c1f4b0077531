"""Structure, capture and plan: names, points, zeros, ranks, distances, plans."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.errors import PointError
from dag_hesse.experiments.models import mlp, resnet18, resnet50
from dag_hesse.plan import Method, plan
from tests.models.zoo import case


def _images(batch: int = 2, side: int = 32, classes: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, side, side), torch.randint(0, classes, (batch,))


def names_of(model: nn.Module, batch: object, **options: object) -> list[str]:
    return [p.name for p in dh.capture(model, batch, **options).points]


def test_default_points() -> None:
    stages = ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert names_of(resnet18(width=4), _images()) == stages
    assert names_of(resnet50(width=4, classes=10), _images(), space="parameter") == [*stages, "head"]
    assert names_of(mlp([3, 4, 5, 2]), (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))) == ["1", "3"]
    gpt = case("hf-gpt2", torch.float32)
    assert names_of(gpt.model, gpt.batch) == ["transformer.h.0", "transformer.h.1"]
    deep = mlp([3] * 40)
    assert len(names_of(deep, (torch.randn(4, 3), torch.randn(4, 3)))) == 16


class Named(nn.Module):
    """Returns tensors under keys whose paths could be mistaken for each other, and taps one more."""

    def __init__(self, tap: str) -> None:
        super().__init__()
        self.layer, self.tap = nn.Linear(3, 2), tap

    def forward(self, x: Tensor) -> dict[object, object]:
        x = dh.tap(self.layer(x), self.tap)
        return {"a": {"b": x.tanh()}, "a.b": x.exp(), 1: x.sin(), "1": x.cos()}


def test_names_of_points_are_of_one_tensor_each() -> None:
    def loss(found: dict[object, object], targets: Tensor) -> Tensor:
        return ((found["a"]["b"] + found["a.b"] * found[1] + found["1"] - targets) ** 2).mean()  # type: ignore[index, operator]

    batch = (torch.randn(5, 3), torch.randn(5, 2))
    names = ["output.a.b", "output.'a.b'", "output.1", "output.'1'"]
    graph = dh.capture(Named("inner"), batch, loss=loss, points=["inner", *names])
    assert sorted(p.name for p in graph.points) == sorted(["inner", *names])
    assert all(len(p.sites) == 1 for p in graph.points)
    for tap, kind in (("layer", "module"), ("layer.weight", "parameter")):
        with pytest.raises(PointError, match=f"'{tap}' has the name of a {kind}"):
            dh.capture(Named(tap), batch, loss=loss)


def test_points_by_glob_call_and_tap() -> None:
    model = resnet18(width=4)
    assert names_of(model, _images(), points="layer[12]") == ["layer1", "layer2"]
    assert names_of(model, _images(), points=["head.weight", "layer3"]) == ["layer3", "head.weight"]
    loop = case("gru-cell-loop")
    assert names_of(loop.model, loop.batch, points=["cell[2]", "cell[0]"]) == ["cell[0]", "cell[2]"]

    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(dh.tap(torch.tanh(self.a(x)), "between"))

    assert names_of(Tapped(), (torch.randn(2, 3), torch.randn(2, 3)), points=["between"]) == ["between"]


def test_printing_a_graph_and_a_structure() -> None:
    model = mlp([3, 4, 3], nn.SiLU)
    graph = dh.capture(model, (torch.randn(4, 3), torch.tensor([0, 1, 1, 0])))
    assert "silu" in str(graph)
    assert "contraction" in str(graph)
    text = str(dh.structure(resnet18(width=4).eval(), _images()))
    assert "5 points" in text
    assert "zero" in text
    assert "independent" in text
    assert "interact, first at" in str(dh.structure(resnet18(width=4), _images()))


def test_structure_knows_what_vanishes_before_any_number() -> None:
    relu = dh.structure(resnet18(width=4).eval(), _images())
    assert not relu.tensor_alive.any()
    assert relu.gn_alive.all()
    silu = dh.structure(resnet18(width=4, activation=nn.SiLU).eval(), _images())
    assert not silu.tensor_alive[-1].any()  # Remark 39: after layer4 everything is linear
    assert silu.tensor_alive[:-1, :-1].all()
    assert (silu.rank_bound == 9).all()  # K - 1
    train = dh.structure(resnet18(width=4), _images())  # BatchNorm in training mode is curved
    assert train.tensor_alive[:-1, :-1].all()
    chain = mlp([6, 5, 2, 5, 4])
    narrow = dh.structure(chain, (torch.randn(7, 6), torch.randn(7, 4)), points=["0", "2", "4"])
    assert narrow.rank_bound[0, 2] == 2  # the bottleneck
    assert narrow.shared_rank_bound[0, 0] == 5
    assert narrow.distance.tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]


def test_siblings_that_meet_linearly_do_not_interact_through_a_linear_loss() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.a(x)) + torch.tanh(self.b(x))

    batch = (torch.randn(4, 3), torch.randn(4, 3))
    found = dh.structure(Branches(), batch, loss=lambda y, t: (y * t).sum())
    assert not found.gn_alive.any()
    assert found.tensor_alive.tolist() == [[True, False], [False, True]]
    report = dh.analyze(Branches(), batch, loss=lambda y, t: (y * t).sum())
    assert report.method["resonance"].tolist() == [["exact", "zero"], ["zero", "exact"]]
    assert report.resonance[0, 1] == 0.0


def test_the_plan_is_data() -> None:
    graph = dh.capture(resnet18(width=8, activation=nn.SiLU).eval(), _images())
    chosen = plan([dh.structure(graph)], probes=16)
    assert chosen.gram_columns > 0
    assert {s.method for s in chosen.sources} <= {"exact", "probes"}
    for methods in (chosen.method, chosen.gn_method, chosen.tensor_method):
        assert all(isinstance(method, Method) for method in methods.flat)
    assert json.loads(json.dumps(chosen.to_dict()))["gn_method"] == [["gram"] * 5] * 5
    pairs = {frozenset((s.point, k)) for s in chosen.sources for k in s.reads}
    assert len(pairs) == 10  # all unordered pairs but those at layer4, each from one end
    assert chosen.flops > 0
    assert "GFLOP" in str(chosen)
    assert chosen.to_dict()["points"] == ["stem", "layer1", "layer2", "layer3", "layer4"]
    bigger = plan([dh.structure(graph)], probes=32)
    assert bigger.flops > chosen.flops


def test_what_the_loss_consumes() -> None:
    c = case("hf-gpt2")
    graph = dh.capture(c.model, c.batch)
    assert [graph.nodes[k].shape[-1] for k in graph.out] == [11]
    named = dh.capture(c.model, c.batch, output="transformer.ln_f")
    assert [named.nodes[k].shape[-1] for k in named.out] == [8]


def test_opaque_ops_are_exact_and_named() -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.b(torch.linalg.inv(torch.eye(3).double() + a.unsqueeze(2) * a.unsqueeze(1)).sum(1))

    from tests.oracle import Truth, error

    torch.manual_seed(0)
    model, x, y = Rare().double(), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    report = dh.analyze(model, (x, y), points=["a", "a.weight"], mode="exact")
    assert report.facts["opaque"]
    assert "opaque" in str(report)
    truth = Truth(model, lambda: ((model(x) - y) ** 2).mean(), ["a"], ["a.weight"])
    for pair, block in truth.full.items():
        if "a" not in pair:
            assert error(report.block(*pair), block) < 1e-10
        assert error(report.block("a", "a"), truth.block("a", "a", "full", "shared")) < 1e-10


def test_distances_of_parameters_are_those_of_their_layers() -> None:
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(4, 4), nn.Tanh())))
    found = dh.structure(
        model, (torch.randn(3, 4), torch.randn(3, 4)), points=["0.weight", "0.bias", "2.weight", "4.bias"]
    )
    order = [found.names.index(name) for name in ("0.weight", "0.bias", "2.weight", "4.bias")]
    expected = [[0, 0, 1, 2], [0, 0, 1, 2], [1, 1, 0, 1], [2, 2, 1, 0]]
    assert found.distance[order][:, order].tolist() == expected


def test_a_parameter_that_no_input_meets_lies_where_it_is_used() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.table * 2) + x)

    found = dh.structure(Table(), (torch.randn(3, 4), torch.randn(3, 2)), points=["table", "layer.weight"])
    assert found.distance.tolist() == [[0, 1], [1, 0]]
