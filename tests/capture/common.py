"""What tests of capture share: a batch, double-backward, and a model with something between two layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dag_hesse as dh
from tests import device
from tests.oracle import error

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(5)).double().to(device.NAME)
Y = torch.tensor([0, 1, 2, 0], device=device.NAME)


def truth(model: nn.Module, batch: Any, names: tuple[str, ...], loss: Callable[..., Tensor] | None = None) -> Tensor:
    """The Hessian by parameters, by double-backward of a copy of the model."""
    twin = copy.deepcopy(model, {id(g): g for g in vars(model).values() if isinstance(g, torch.Generator)})
    model = twin
    own = [dict(model.named_parameters())[name] for name in names]
    inputs, targets = batch
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        output = model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    if loss is not None:
        value = loss(output, targets)
    elif targets is None:
        value = output
    else:
        value = F.cross_entropy(output, targets)
    first = torch.autograd.grad(value, own, create_graph=True, allow_unused=True)
    flat = torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(first, own, strict=True)]
    )
    rows = []
    for g in flat:
        row = (
            torch.autograd.grad(g, own, retain_graph=True, allow_unused=True) if g.requires_grad else [None] * len(own)
        )
        rows.append(
            torch.cat(
                [torch.zeros_like(p).flatten() if r is None else r.flatten() for r, p in zip(row, own, strict=True)]
            )
        )
    return torch.stack(rows)


def agree(
    model: nn.Module, batch: Any = (X, Y), loss: Callable[..., Tensor] | None = None, seed: int = 0, **options: Any
) -> None:
    """Ours and double-backward's Hessian, from the same random state."""
    torch.manual_seed(seed)
    operator = dh.HessianOperator(model, batch, loss=loss, **options)
    found = operator.dense()
    torch.manual_seed(seed)
    assert error(found, truth(model, batch, operator.names, loss)) < 1e-10


class Around(nn.Module):
    """Two linear layers with something between; parts of it live on the module."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = nn.Linear(3, 4), nn.Linear(4, 3), between
        for name, value in parts.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.between(self, self.a(x))))


def linear(*parts: Any) -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(4, 4)


def branch(m: Any, z: Tensor) -> Tensor:
    if z.sum() > 0:
        return z.sin()
    return z.cos() * z.abs().max().item()


def module_in_a_list(m: Any, z: Tensor) -> Tensor:
    return m.fn(z, 0.5)
