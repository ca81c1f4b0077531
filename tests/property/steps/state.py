"""Steps that keep state or write to what no other step sees."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.property.steps.parts import WIDTH


def counter(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return x / m.count


def counter_copied(m: Any, x: Tensor) -> Tensor:
    m.count.add_(0.5)
    return x * (1.0 + 1.0 / m.count.clone())


def moving_average(m: Any, x: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return x - m.mean


def moving_average_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.mean.lerp_(x.mean(0), 0.3)
    return torch.tanh(x) + m.mean


def kept_with_past(m: Any, x: Tensor) -> Tensor:
    m.seen = 0.5 * m.seen + x.mean(0)
    return x * m.seen


def kept_in_list(m: Any, x: Tensor) -> Tensor:
    m.calls.append(x)
    return x + 0.3 * m.calls[len(m.calls) // 2]


def weight_masked(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.masked.weight.mul_(m.mask)
    return m.masked(x)


def weight_assigned(m: Any, x: Tensor) -> Tensor:
    m.moved.weight.data = torch.renorm(m.moved.weight.data, 2, 0, 0.7)
    return m.moved(x)


def scale_written(m: Any, x: Tensor) -> Tensor:
    if "scale" not in m.touched:  # autograd does not see the write, and would use the new value for older products
        m.touched.add("scale")
        m.scale.data.clamp_(-0.5, 0.5)
        m.scale.detach()[0] = 0.25
    return x * m.scale


def scale_added(m: Any, x: Tensor) -> Tensor:
    w = m.scale * 1.0
    w[1:] += x.mean(0)[1:]
    return x + w


def written_behind(m: Any, x: Tensor) -> Tensor:
    w = x * 2
    w.data.mul_(0.7)
    w.detach()[:, 1:].add_(0.3)
    return w


def filled_behind(m: Any, x: Tensor) -> Tensor:
    w = x.clone()
    with torch.no_grad():
        w[:, 0] = w[:, 1] * 0.5
        w.clamp_(-1.5, 1.5)
    return w * x


def exchanged(m: Any, x: Tensor) -> Tensor:
    w = x * 1.5
    w.data = w.data.flip(0).contiguous()
    return w + x


def through_views(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    first, rest = x[:, :1], x[:, 1:]
    rest.mul_(first.sigmoid())
    x.t()[1].add_(x[:, 0].clone())
    x.unsqueeze(0).squeeze_(0)[..., ::2].neg_()
    return x


def pairs_of_rows(m: Any, x: Tensor) -> Tensor:
    z = torch.cat([x, x.sin()], 1)
    pairs = z.view(len(x), 2, WIDTH)
    pairs[:, 0].mul_(pairs[:, 1].exp().clamp(max=2.0))
    pairs.transpose(1, 2)[:, 0].add_(0.2)
    return z[:, :WIDTH] + pairs[:, 1]


def diagonal(m: Any, x: Tensor) -> Tensor:
    z = x.unsqueeze(2) * x.unsqueeze(1)
    z.diagonal(dim1=1, dim2=2).copy_(x.tanh())
    return z.sum(2)


def chunks(m: Any, x: Tensor) -> Tensor:
    a, b, c = x.clone().unbind(1)
    return torch.stack([a * b.exp().clamp(max=3.0), c.sin(), b], 1)


def split_written(m: Any, x: Tensor) -> Tensor:
    z = torch.cat([x, x * 0.5], 1)
    a, b = z.narrow(1, 0, WIDTH), z.narrow(1, WIDTH, WIDTH)
    a += b.tanh()
    b *= 0.3
    return z[:, 1 : WIDTH + 1]


def strided(m: Any, x: Tensor) -> Tensor:
    x = x.contiguous()
    z = x.clone()
    z.as_strided((2, 2), (WIDTH, 1), 1).mul_(0.5)
    return z + x.as_strided((len(x), WIDTH), (WIDTH, 1))


def zeros_filled(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for k in range(WIDTH):
        out[:, k] = x[:, k] * x[:, (k + 1) % WIDTH]
    out[0] += 0.1
    return out


def accumulated(m: Any, x: Tensor) -> Tensor:
    index = torch.tensor([[0, 1, 1]], device=x.device).expand(len(x), -1)
    out = torch.zeros_like(x).scatter_add_(1, index, x)
    return out.index_add_(0, torch.tensor([0, 0], device=x.device), x[:2].tanh())


def addmm(m: Any, x: Tensor) -> Tensor:
    return x.clone().addmm_(x, m.inner.weight, beta=0.5, alpha=0.3).addcmul_(x, x.sin(), value=0.2)


def foreach(m: Any, x: Tensor) -> Tensor:
    a, b = torch._foreach_mul([x, x.sin()], [2.0, 0.5])
    torch._foreach_add_([a, b], 0.1)
    return a * b


def out(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        torch.mul(m.mask[0], 0.5, out=m.seen)
    return x * m.seen.clone() + 0.2 * x


def relu_and_co(m: Any, x: Tensor) -> Tensor:
    return F.leaky_relu_(F.elu_(F.silu(x * 1.0, inplace=True)).clone().add_(0.1), 0.2)


def fill(m: Any, x: Tensor) -> Tensor:
    z = x * x
    z[0, 1] = 0.3
    z[:, 2].fill_(x.detach().mean())
    return z.masked_fill_(x > 0.8, 0.5)
