"""Products with the Jacobian of the output, against torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dag_hesse as dh
from dag_hesse import errors
from tests.oracle import error


class Tied(nn.Module):
    """A weight that is used twice, one that is not used, and an output with two axes behind the samples'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.idle, self.norm, self.head = nn.Linear(4, 4), nn.Linear(2, 2), nn.LayerNorm(4), nn.Linear(4, 6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.layer(x).tanh()))).view(-1, 3, 2)


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (5, 2), generator=generator)


def _jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """(*out, n), by reverse-mode differentiation."""
    found = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(dict(model.named_parameters()))
    return torch.cat([j.flatten(3) for j in found.values()], -1)


def test_products_with_the_jacobian_and_its_transpose() -> None:
    model, (x, y) = Tied(), _batch()
    J = _jacobian(model, x).detach()
    n = J.shape[-1]
    v, u = torch.randn(n, 3, dtype=torch.float64), torch.randn(5, 3, 2, 4, dtype=torch.float64)
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    for batch, options in (((x, y), {}), (loader, {}), (loader, {"memory": 1, "reduction": "mean"})):
        G = dh.GGNOperator(model, batch, **options)  # type: ignore[arg-type]
        assert error(G.jvp(v), J @ v) < 1e-12 and error(G.jvp(v[:, 0]), J @ v[:, 0]) < 1e-12
        assert error(G.vjp(u), torch.einsum("abcn,abck->nk", J, u)) < 1e-12
        assert error(G.vjp(u[..., 0].clone()), torch.einsum("abcn,abc->n", J, u[..., 0])) < 1e-12
    named = dict(zip(G.names, [p.detach() for p in model.parameters()], strict=True))
    flat = torch.cat([p.reshape(-1) for p in named.values()])
    assert error(G.jvp(named), J @ flat) < 1e-12 and error(G.jvp(list(named.values())), J @ flat) < 1e-12
    columns = {name: torch.stack([p, 2 * p], -1) for name, p in named.items()}
    assert error(G.jvp(columns), torch.stack([J @ flat, 2 * (J @ flat)], -1)) < 1e-12
    one = torch.zeros(5, 3, 2, dtype=torch.float64)
    one[3, 1, 0] = 1
    assert error(G.vjp(one), J[3, 1, 0]) < 1e-12  # a row of one sample's Jacobian


def test_some_parameters_groups_and_activations() -> None:
    model, (x, y) = Tied(), _batch()
    J = _jacobian(model, x).detach()
    some = dh.GGNOperator(model, (x, y), params=[model.head.bias, model.layer.weight])
    picked = torch.cat([J[..., -6:], J[..., :16]], -1)
    v = torch.randn(22, dtype=torch.float64)
    assert error(some.jvp(v), picked @ v) < 1e-12
    groups = dh.GGNOperator(model, (x, y), points=["layer"])
    w = torch.randn(20, dtype=torch.float64)
    assert error(groups.jvp(w), J[..., :20] @ w) < 1e-12
    shared = dh.GGNOperator(model, (x, y), space="activation", points=["norm"])
    weight = model.head.weight.detach()
    z, u = torch.randn(4, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)
    assert error(shared.jvp(z), (weight @ z).reshape(1, 3, 2).expand(5, 3, 2)) < 1e-12
    assert error(shared.vjp(u), u.reshape(5, 6).sum(0) @ weight) < 1e-12


def test_what_has_no_product() -> None:
    model, (x, y) = Tied(), _batch()
    G = dh.GGNOperator(model, (x, y))
    bad: list[tuple[Any, str]] = [
        (torch.ones(5, 3, 3).double(), r"shape \(5, 3, 3\); expected that of the outputs, \(5, 3, 2\)"),
        (torch.ones(5, 3, 2), "torch.float32"),
        ("u", "a str"),
        (torch.ones(5, 3, 2, 0).double(), "k columns"),
    ]
    for u, message in bad:
        with pytest.raises(errors.VectorError, match=message):
            G.vjp(u)
    with pytest.raises(errors.VectorError):
        G.jvp(torch.ones(3).double())
    with pytest.raises(errors.OptionError, match="batch_mode='shared'"):
        joint = dh.GGNOperator(model, (x, y), space="activation", points=["norm"], batch_mode="joint")
        joint.jvp(torch.ones(joint.shape[0]).double())
    two = dh.GGNOperator(nn.ModuleList([model])[0], (x, y))
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(errors.StaleError):
        two.jvp(torch.ones(two.shape[0]).double())
