"""Steps that mask, branch, look at values as Python's numbers, or cut derivatives off."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.property.steps.parts import WIDTH


def masked_write(m: Any, x: Tensor) -> Tensor:
    o = x.clone()
    o[o <= 0] = o[o <= 0] * 0.2
    return o


def masked_scale(m: Any, x: Tensor) -> Tensor:
    z = x.clone()
    z[z > 0.3] *= 0.5
    z[z.abs() < 0.2] += 1.0
    return z


def index_put(m: Any, x: Tensor) -> Tensor:
    rows, columns = torch.nonzero(x > 0, as_tuple=True)
    return x.index_put((rows, columns), x[rows, columns].sin(), accumulate=True)


def rows(m: Any, x: Tensor) -> Tensor:
    keep = torch.nonzero(x[:, 0] > 0).squeeze(1)
    return (0.5 * x).index_add(0, keep, x[keep] ** 2)


def masked_scatter(m: Any, x: Tensor) -> Tensor:
    keep = x > 0.1
    return x.masked_scatter(keep, x.masked_select(keep).tanh().flip(0))


def selected_sum(m: Any, x: Tensor) -> Tensor:
    return x * torch.tanh(x[x.abs() > 0.4].sum())


def branch(m: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x.sin()
    return x.cos() * 0.7


def item(m: Any, x: Tensor) -> Tensor:
    return x / (1.0 + x.abs().max().item())


def loop(m: Any, x: Tensor) -> Tensor:
    for _ in range(4):
        if x.norm() < 1.0:
            break
        x = x * 0.6 + 0.1 * x.sin()
    return x


def to_list(m: Any, x: Tensor) -> Tensor:
    return x * torch.tensor(x.detach().mean(0).tanh().tolist()).to(x)


def chosen_layer(m: Any, x: Tensor) -> Tensor:
    return [m.inner, m.masked, torch.sin][int(x.mean(0).argmax())](x)


def experts(m: Any, x: Tensor) -> Tensor:
    weights, chosen = torch.softmax(m.inner(x), -1).topk(2, -1)
    out = torch.zeros_like(x)
    for k, expert in enumerate((m.masked, m.moved, torch.tanh)):
        row, place = torch.where(chosen == k)
        if len(row):
            out.index_add_(0, row, expert(x[row]) * weights[row, place, None])
    return out


def looked_up(m: Any, x: Tensor) -> Tensor:
    return x * m.table(torch.bucketize(x.detach()[:, 0].contiguous(), torch.tensor([-0.5, 0.0, 0.5]).to(x)))


def one_hot(m: Any, x: Tensor) -> Tensor:
    return x + F.one_hot(x.argmax(-1), WIDTH) * x.logsumexp(-1, keepdim=True)


def straight_through(m: Any, x: Tensor) -> Tensor:
    return x + (torch.floor(3 * x + 0.3) / 3 - x).detach() + (x * x).detach()


def hard_gate(m: Any, x: Tensor) -> Tensor:
    soft = x.sigmoid()
    return ((soft > 0.5).to(x.dtype) - soft.detach() + soft) * x


def without_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.sigmoid().mean(-1, keepdim=True)
    return x * scale


def data(m: Any, x: Tensor) -> Tensor:
    return x * x.data.tanh() + x.detach().requires_grad_().sin()


def max_removed(m: Any, x: Tensor) -> Tensor:
    e = (x - x.detach().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)
