"""Graph networks of PyTorch Geometric against double-backward: convolutions, pooling, masked losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as g
from torch import Tensor, nn

import dag_hesse as dh
from tests.oracle import Leaves, error

NODES, EDGES, FEATURES, CLASSES = 6, 14, 4, 3
_draw = torch.Generator().manual_seed(3)
X = torch.randn(NODES, FEATURES, generator=_draw).double()
LINKS = torch.randint(0, NODES, (2, EDGES), generator=_draw)
WEIGHTS = torch.randn(EDGES, 3, generator=_draw).double()
KINDS = torch.randint(0, 2, (EDGES,), generator=_draw)
OF_GRAPH = torch.tensor([0, 0, 0, 1, 1, 1])
LABELS = torch.randint(0, CLASSES, (NODES,), generator=_draw)
MASK = torch.tensor([True, False, True, True, False, True])


class Net(nn.Module):
    """Two convolutions, and a pooling if there is one."""

    def __init__(
        self, first: nn.Module, second: nn.Module, *extra: Any, pool: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.first, self.second, self.extra, self.pool = first, second, extra, pool
        self.labels = LABELS if pool is None else LABELS[:2]
        self.double()

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        x = torch.tanh(self.first(x, links, *self.extra))
        x = self.second(x, links, *self.extra)
        return x if self.pool is None else self.pool(x)


class TopK(nn.Module):
    """Keeps the nodes of the highest scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool, self.second = g.GCNConv(4, 5), g.TopKPooling(5, ratio=0.5), g.GCNConv(5, 3)
        self.labels = LABELS[:2]
        self.double()

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        x = torch.tanh(self.first(x, links))
        x, links, _, batch, _, _ = self.pool(x, links, None, OF_GRAPH)
        return g.global_mean_pool(self.second(x, links), batch)


class Normed(nn.Module):
    """BatchNorm over nodes, LayerNorm over graphs, dropout, jumping knowledge."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = g.GCNConv(4, 5), g.GCNConv(5, 5), g.BatchNorm(5)
        self.graph_norm, self.jump, self.last = g.GraphNorm(5), g.JumpingKnowledge("max"), nn.Linear(5, 3)
        self.labels = LABELS
        self.double()

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        x = F.silu(self.norm(self.first(x, links)))
        y = self.graph_norm(self.second(F.dropout(x, 0.3), links), OF_GRAPH)
        return self.last(self.jump([x, y]))


def _maps(rows: int, columns: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, rows * columns))


def _gcn(pool: Callable[..., Tensor], *sizes: int) -> nn.Module:
    return Net(g.GCNConv(4, 5), g.GCNConv(5, 3), pool=lambda x: pool(x, OF_GRAPH, *sizes))


def _attention_pool() -> nn.Module:
    net = _gcn(g.global_mean_pool)
    net.gate = g.AttentionalAggregation(nn.Linear(3, 1)).double()
    net.pool = lambda x: net.gate(x, OF_GRAPH)
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: Net(g.GCNConv(4, 5), g.GCNConv(5, 3)),
    "GAT": lambda: Net(g.GATConv(4, 5), g.GATConv(5, 3)),
    "GATv2": lambda: Net(g.GATv2Conv(4, 5, heads=2, concat=False), g.GATv2Conv(5, 3)),
    "SAGE, mean": lambda: Net(g.SAGEConv(4, 5), g.SAGEConv(5, 3)),
    "SAGE, max": lambda: Net(g.SAGEConv(4, 5, aggr="max"), g.SAGEConv(5, 3, aggr="max")),
    "GIN": lambda: Net(
        g.GINConv(nn.Sequential(nn.Linear(4, 5), nn.Tanh())), g.GINConv(nn.Linear(5, 3), train_eps=True)
    ),
    "NNConv": lambda: Net(g.NNConv(4, 5, _maps(4, 5)), g.NNConv(5, 3, _maps(5, 3)), WEIGHTS),
    "TransformerConv": lambda: Net(g.TransformerConv(4, 5), g.TransformerConv(5, 3)),
    "RGCN": lambda: Net(g.RGCNConv(4, 5, 2), g.RGCNConv(5, 3, 2), KINDS),
    "Chebyshev": lambda: Net(g.ChebConv(4, 5, 2), g.ChebConv(5, 3, 2)),
    "TAG": lambda: Net(g.TAGConv(4, 5), g.TAGConv(5, 3)),
    "gated": lambda: Net(g.GatedGraphConv(5, 2), g.GCNConv(5, 3)),
    "PNA": lambda: Net(
        g.GCNConv(4, 5),
        g.PNAConv(5, 3, ["mean", "max", "std"], ["identity", "amplification"], torch.tensor([0, 2, 2, 1, 1])),
    ),
    "mean of graphs": lambda: _gcn(g.global_mean_pool),
    "mean of graphs, number given": lambda: _gcn(g.global_mean_pool, 2),
    "maximum of graphs": lambda: _gcn(g.global_max_pool),
    "maximum of graphs, number given": lambda: _gcn(g.global_max_pool, 2),
    "sum of graphs": lambda: _gcn(g.global_add_pool),
    "sum of graphs, number given": lambda: _gcn(g.global_add_pool, 2),
    "attention over graphs": _attention_pool,
    "TopKPooling": TopK,
    "norms": Normed,
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]()


def turned(loss: Tensor, places: Sequence[Tensor], v: Tensor) -> Tensor:
    """H v by double-backward."""
    first = torch.autograd.grad(loss, places, create_graph=True, allow_unused=True)
    parts = v.split([p.numel() for p in places])
    pairs = [(x, y.view_as(x)) for x, y in zip(first, parts, strict=True) if x is not None and x.requires_grad]
    found = torch.autograd.grad([x for x, _ in pairs], places, [y for _, y in pairs], allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if h is None else h).flatten() for h, p in zip(found, places, strict=True)])


def random(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("name", MODELS)
def test_products_by_parameters(name: str) -> None:
    model = model_of(name)
    torch.manual_seed(0)  # dropout
    operator = dh.HessianOperator(model, ((X, LINKS), model.labels))
    own, v = [dict(model.named_parameters())[n] for n in operator.names], random(operator.shape[0])
    found = operator @ v
    torch.manual_seed(0)
    assert error(found, turned(F.cross_entropy(model(X, LINKS), model.labels), own, v)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_products_by_activations(name: str) -> None:
    model, points = model_of(name), ["first", "second"]
    torch.manual_seed(0)
    with Leaves(model, points) as leaves:
        loss = F.cross_entropy(model(X, LINKS), model.labels)
    torch.manual_seed(0)
    operator = dh.HessianOperator(
        model, ((X, LINKS), model.labels), points=points, space="activation", batch_mode="joint"
    )
    v = random(operator.shape[0])
    assert error(operator @ v, turned(loss, [leaves.made[n][0] for n in operator.names], v)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_default_points(name: str) -> None:
    model = model_of(name)
    report = dh.analyze(model, ((X, LINKS), model.labels), probes=2)
    assert (report.resonance >= 0).all()
    assert report.resonance.any()


@pytest.mark.parametrize("name", ["GCN", "GAT", "SAGE, max"])
def test_losses_of_some_nodes(name: str) -> None:
    model = model_of(name)
    loss = lambda o, y: F.cross_entropy(o[MASK], y[MASK])  # noqa: E731
    operator = dh.HessianOperator(model, ((X, LINKS), LABELS), loss=loss)
    own, v = [dict(model.named_parameters())[n] for n in operator.names], random(operator.shape[0])
    assert error(operator @ v, turned(loss(model(X, LINKS), LABELS), own, v)) < 1e-10


class AllPairs(nn.Module):
    """Links between all atoms, without torch_cluster."""

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        n = len(pos)
        links = torch.tensor([(a, b) for a in range(n) for b in range(n) if a != b and batch[a] == batch[b]]).T
        return links, (pos[links[0]] - pos[links[1]]).norm(dim=-1)


def test_schnet() -> None:
    torch.manual_seed(0)
    model = g.SchNet(
        hidden_channels=8, num_filters=8, num_interactions=2, num_gaussians=5, cutoff=5.0, interaction_graph=AllPairs()
    ).double()
    inputs = torch.tensor([1, 6, 8, 1, 6, 1]), torch.randn(6, 3).double(), OF_GRAPH
    targets = torch.randn(2, 1).double()
    operator = dh.HessianOperator(model, (inputs, targets))
    own, v = [dict(model.named_parameters())[n] for n in operator.names], random(operator.shape[0])
    assert error(operator @ v, turned(F.mse_loss(model(*inputs), targets), own, v)) < 1e-10
    report = dh.analyze(model, (inputs, targets), probes=2)
    assert (report.resonance >= 0).all()
