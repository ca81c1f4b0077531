"""Steps with state, writes, draws, branches, complex numbers, derivatives and ops without a rule, for random models.

A step is called with the model, whose parts it may use, and its inputs. Those of ``WITHIN`` write to nothing that
another step can see but buffers and parameters of their own; those of ``ACROSS`` write to what they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 3
Step = Callable[..., Tensor]


class Parts(nn.Module):
    """What steps may use: buffers, parameters that some write to, small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.masked, self.moved = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 1, dropout=0.2, batch_first=True)
        self.norm = nn.BatchNorm1d(WIDTH, eps=1e-1)
        self.table = nn.Embedding(4, WIDTH)
        self.register_buffer("count", torch.tensor(1.0))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.register_buffer("mask", torch.tril(torch.ones(WIDTH, WIDTH)))
        self.calls: list[Tensor] = []
        self.touched: set[str] = set()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return factor * x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * ctx.factor * g * x**2, None


class Pair(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin() * y, (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        x, y = ctx.saved_tensors
        return g * x.cos() * y, g * x.sin()


class Surrogate(torch.autograd.Function):
    """A step forward, a sigmoid's slope backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s * (1 - s)


# --- state and writes -------------------------------------------------------------------------------------------------


def _counter(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return x / m.count


def _counter_copied(m: Any, x: Tensor) -> Tensor:
    m.count.add_(0.5)
    return x * (1.0 + 1.0 / m.count.clone())


def _moving_average(m: Any, x: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return x - m.mean


def _moving_average_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.mean.lerp_(x.mean(0), 0.3)
    return torch.tanh(x) + m.mean


def _kept_with_past(m: Any, x: Tensor) -> Tensor:
    m.seen = 0.5 * m.seen + x.mean(0)
    return x * m.seen


def _kept_in_list(m: Any, x: Tensor) -> Tensor:
    m.calls.append(x)
    return x + 0.3 * m.calls[len(m.calls) // 2]


def _weight_masked(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.masked.weight.mul_(m.mask)
    return m.masked(x)


def _weight_assigned(m: Any, x: Tensor) -> Tensor:
    m.moved.weight.data = torch.renorm(m.moved.weight.data, 2, 0, 0.7)
    return m.moved(x)


def _scale_written(m: Any, x: Tensor) -> Tensor:
    if "scale" not in m.touched:  # autograd does not see the write, and would use the new value for older products
        m.touched.add("scale")
        m.scale.data.clamp_(-0.5, 0.5)
        m.scale.detach()[0] = 0.25
    return x * m.scale


def _scale_added(m: Any, x: Tensor) -> Tensor:
    w = m.scale * 1.0
    w[1:] += x.mean(0)[1:]
    return x + w


def _written_behind(m: Any, x: Tensor) -> Tensor:
    w = x * 2
    w.data.mul_(0.7)
    w.detach()[:, 1:].add_(0.3)
    return w


def _filled_behind(m: Any, x: Tensor) -> Tensor:
    w = x.clone()
    with torch.no_grad():
        w[:, 0] = w[:, 1] * 0.5
        w.clamp_(-1.5, 1.5)
    return w * x


def _exchanged(m: Any, x: Tensor) -> Tensor:
    w = x * 1.5
    w.data = w.data.flip(0).contiguous()
    return w + x


def _through_views(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    first, rest = x[:, :1], x[:, 1:]
    rest.mul_(first.sigmoid())
    x.t()[1].add_(x[:, 0].clone())
    x.unsqueeze(0).squeeze_(0)[..., ::2].neg_()
    return x


def _pairs_of_rows(m: Any, x: Tensor) -> Tensor:
    z = torch.cat([x, x.sin()], 1)
    pairs = z.view(len(x), 2, WIDTH)
    pairs[:, 0].mul_(pairs[:, 1].exp().clamp(max=2.0))
    pairs.transpose(1, 2)[:, 0].add_(0.2)
    return z[:, :WIDTH] + pairs[:, 1]


def _diagonal(m: Any, x: Tensor) -> Tensor:
    z = x.unsqueeze(2) * x.unsqueeze(1)
    z.diagonal(dim1=1, dim2=2).copy_(x.tanh())
    return z.sum(2)


def _chunks(m: Any, x: Tensor) -> Tensor:
    a, b, c = x.clone().unbind(1)
    return torch.stack([a * b.exp().clamp(max=3.0), c.sin(), b], 1)


def _split_written(m: Any, x: Tensor) -> Tensor:
    z = torch.cat([x, x * 0.5], 1)
    a, b = z.narrow(1, 0, WIDTH), z.narrow(1, WIDTH, WIDTH)
    a += b.tanh()
    b *= 0.3
    return z[:, 1 : WIDTH + 1]


def _strided(m: Any, x: Tensor) -> Tensor:
    x = x.contiguous()
    z = x.clone()
    z.as_strided((2, 2), (WIDTH, 1), 1).mul_(0.5)
    return z + x.as_strided((len(x), WIDTH), (WIDTH, 1))


def _zeros_filled(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for k in range(WIDTH):
        out[:, k] = x[:, k] * x[:, (k + 1) % WIDTH]
    out[0] += 0.1
    return out


def _accumulated(m: Any, x: Tensor) -> Tensor:
    index = torch.tensor([[0, 1, 1]], device=x.device).expand(len(x), -1)
    out = torch.zeros_like(x).scatter_add_(1, index, x)
    return out.index_add_(0, torch.tensor([0, 0], device=x.device), x[:2].tanh())


def _addmm(m: Any, x: Tensor) -> Tensor:
    return x.clone().addmm_(x, m.inner.weight, beta=0.5, alpha=0.3).addcmul_(x, x.sin(), value=0.2)


def _foreach(m: Any, x: Tensor) -> Tensor:
    a, b = torch._foreach_mul([x, x.sin()], [2.0, 0.5])
    torch._foreach_add_([a, b], 0.1)
    return a * b


def _out(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        torch.mul(m.mask[0], 0.5, out=m.seen)
    return x * m.seen.clone() + 0.2 * x


def _relu_and_co(m: Any, x: Tensor) -> Tensor:
    return F.leaky_relu_(F.elu_(F.silu(x * 1.0, inplace=True)).clone().add_(0.1), 0.2)


def _fill(m: Any, x: Tensor) -> Tensor:
    z = x * x
    z[0, 1] = 0.3
    z[:, 2].fill_(x.detach().mean())
    return z.masked_fill_(x > 0.8, 0.5)


# --- masks, branches, Python's numbers --------------------------------------------------------------------------------


def _masked_write(m: Any, x: Tensor) -> Tensor:
    o = x.clone()
    o[o <= 0] = o[o <= 0] * 0.2
    return o


def _masked_scale(m: Any, x: Tensor) -> Tensor:
    z = x.clone()
    z[z > 0.3] *= 0.5
    z[z.abs() < 0.2] += 1.0
    return z


def _index_put(m: Any, x: Tensor) -> Tensor:
    rows, columns = torch.nonzero(x > 0, as_tuple=True)
    return x.index_put((rows, columns), x[rows, columns].sin(), accumulate=True)


def _rows(m: Any, x: Tensor) -> Tensor:
    keep = torch.nonzero(x[:, 0] > 0).squeeze(1)
    return (0.5 * x).index_add(0, keep, x[keep] ** 2)


def _masked_scatter(m: Any, x: Tensor) -> Tensor:
    keep = x > 0.1
    return x.masked_scatter(keep, x.masked_select(keep).tanh().flip(0))


def _selected_sum(m: Any, x: Tensor) -> Tensor:
    return x * torch.tanh(x[x.abs() > 0.4].sum())


def _branch(m: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x.sin()
    return x.cos() * 0.7


def _item(m: Any, x: Tensor) -> Tensor:
    return x / (1.0 + x.abs().max().item())


def _loop(m: Any, x: Tensor) -> Tensor:
    for _ in range(4):
        if x.norm() < 1.0:
            break
        x = x * 0.6 + 0.1 * x.sin()
    return x


def _to_list(m: Any, x: Tensor) -> Tensor:
    return x * torch.tensor(x.detach().mean(0).tanh().tolist()).to(x)


def _chosen_layer(m: Any, x: Tensor) -> Tensor:
    return [m.inner, m.masked, torch.sin][int(x.mean(0).argmax())](x)


def _experts(m: Any, x: Tensor) -> Tensor:
    weights, chosen = torch.softmax(m.inner(x), -1).topk(2, -1)
    out = torch.zeros_like(x)
    for k, expert in enumerate((m.masked, m.moved, torch.tanh)):
        row, place = torch.where(chosen == k)
        if len(row):
            out.index_add_(0, row, expert(x[row]) * weights[row, place, None])
    return out


def _looked_up(m: Any, x: Tensor) -> Tensor:
    return x * m.table(torch.bucketize(x.detach()[:, 0].contiguous(), torch.tensor([-0.5, 0.0, 0.5]).to(x)))


def _one_hot(m: Any, x: Tensor) -> Tensor:
    return x + F.one_hot(x.argmax(-1), WIDTH) * x.logsumexp(-1, keepdim=True)


# --- what is cut off --------------------------------------------------------------------------------------------------


def _straight_through(m: Any, x: Tensor) -> Tensor:
    return x + (torch.floor(3 * x + 0.3) / 3 - x).detach() + (x * x).detach()


def _hard_gate(m: Any, x: Tensor) -> Tensor:
    soft = x.sigmoid()
    return ((soft > 0.5).to(x.dtype) - soft.detach() + soft) * x


def _without_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.sigmoid().mean(-1, keepdim=True)
    return x * scale


def _data(m: Any, x: Tensor) -> Tensor:
    return x * x.data.tanh() + x.detach().requires_grad_().sin()


def _max_removed(m: Any, x: Tensor) -> Tensor:
    e = (x - x.detach().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


# --- complex numbers --------------------------------------------------------------------------------------------------


def _four(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1] * 0.5], 1)


def _fft(m: Any, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x)
    return torch.fft.irfft(spectrum * torch.tensor([1.0, 0.5 + 0.2j]).to(spectrum), n=WIDTH)


def _power_spectrum(m: Any, x: Tensor) -> Tensor:
    spectrum = torch.fft.fft(x)
    return (spectrum * spectrum.conj()).real * 0.2 + spectrum.imag * 0.5


def _rotated(m: Any, x: Tensor) -> Tensor:
    z = torch.view_as_complex(_four(x).reshape(len(x), 2, 2))
    turned = z * torch.polar(torch.ones(2), torch.arange(2.0)).to(z)
    return torch.view_as_real(turned).flatten(1)[:, :WIDTH]


def _modulus(m: Any, x: Tensor) -> Tensor:
    return (torch.complex(x, x.flip(1)) + (1.5 + 0.5j)).abs() * 0.5


def _complex_written(m: Any, x: Tensor) -> Tensor:
    z = torch.complex(x, x.sin())
    torch.view_as_real(z)[..., 0].mul_(0.5)
    z[:, 0] *= 1j
    return z.real + torch.view_as_real(z.exp())[..., 1].clamp(-2, 2)


def _wirtinger(m: Any, x: Tensor) -> Tensor:
    z = (x + 1j * x.roll(1, 1)) @ torch.complex(m.inner.weight, m.masked.weight)
    return (z / (2.0 + (z * z.conj()).real)).real


# --- ops without a rule, and functions of the user's ------------------------------------------------------------------


def _solve(m: Any, x: Tensor) -> Tensor:
    return torch.linalg.solve(x.mT @ x + torch.eye(WIDTH).to(x), x.mT).mT


def _inverse(m: Any, x: Tensor) -> Tensor:
    return x @ torch.linalg.inv(m.inner.weight @ m.inner.weight.mT + torch.eye(WIDTH).to(x))


def _matrix_exp(m: Any, x: Tensor) -> Tensor:
    return x @ torch.linalg.matrix_exp(0.3 * m.inner.weight)


def _cholesky(m: Any, x: Tensor) -> Tensor:
    return x @ torch.linalg.cholesky(m.inner.weight @ m.inner.weight.mT + torch.eye(WIDTH).to(x))


def _cell(m: Any, x: Tensor) -> Tensor:
    return m.cell(x, x.sin()) + m.cell(x)


def _multihead(m: Any, x: Tensor) -> Tensor:
    z = torch.stack([x, x.sin()], 1)
    return m.attention(z, z, z, need_weights=False)[0].mean(1)


def _flash(m: Any, x: Tensor) -> Tensor:
    z = torch.stack([x, x.sin(), x * 0.5], 1)
    return F.scaled_dot_product_attention(z, z.cos(), z, is_causal=True)[:, 2]


# --- derivatives inside, transforms -----------------------------------------------------------------------------------


def _with_grad(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.clone().requires_grad_()


def _derivative(m: Any, x: Tensor) -> Tensor:
    x = _with_grad(x)
    (g,) = torch.autograd.grad(m.inner(x).tanh().sum(), x, create_graph=True)
    return g * x


def _inner_step(m: Any, x: Tensor) -> Tensor:
    w = m.inner.weight
    (g,) = torch.autograd.grad((x @ w).square().mean(), w, create_graph=True)
    return x @ (w - 0.3 * g)


def _first_order_step(m: Any, x: Tensor) -> Tensor:
    x = _with_grad(x)
    (g,) = torch.autograd.grad((x * x.sin()).sum(), x, retain_graph=True)
    return x - 0.3 * g


def _functional(m: Any, x: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(lambda t: F.silu(m.inner(t)).sum()))(x)


def _pushed(m: Any, x: Tensor) -> Tensor:
    return torch.func.jvp(lambda t: m.inner(t).tanh(), (x,), (x.sin(),))[1]


def _vmapped(m: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda row, scale: torch.outer(row, row.sin()).sum(0) * scale, (0, None))(x, m.scale)


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda t: m.inner(t).cos(), x, use_reentrant=False)


# --- draws ------------------------------------------------------------------------------------------------------------


def _noise(m: Any, x: Tensor) -> Tensor:
    return x * torch.rand_like(x) + 0.1 * torch.randn(WIDTH).to(x)


def _bernoulli(m: Any, x: Tensor) -> Tensor:
    return x * torch.empty_like(x).bernoulli_(0.7) + torch.bernoulli(x.detach().sigmoid()) * 0.3


def _reparametrized(m: Any, x: Tensor) -> Tensor:
    return torch.distributions.Normal(x, F.softplus(x)).rsample()


def _shuffled(m: Any, x: Tensor) -> Tensor:
    return x[torch.randperm(len(x))] + 0.5 * x


def _dropout_unread(m: Any, x: Tensor) -> Tensor:
    F.dropout(x, 0.5)
    return F.dropout(x, 0.3, inplace=False) + torch.rand(()).to(x)


def _sampled(m: Any, x: Tensor) -> Tensor:
    return x + m.table(torch.multinomial(torch.softmax(x.detach(), -1), 1).squeeze(1))


def _of(op: Callable[[Tensor], Tensor]) -> Step:
    return lambda m, x: op(x)


WITHIN: dict[str, Step] = {
    "counter": _counter,
    "counter, copied": _counter_copied,
    "moving average": _moving_average,
    "moving average without grad": _moving_average_no_grad,
    "state with a past": _kept_with_past,
    "list of states": _kept_in_list,
    "weight masked": _weight_masked,
    "weight assigned": _weight_assigned,
    "scale written": _scale_written,
    "scale added to": _scale_added,
    "written behind": _written_behind,
    "filled behind": _filled_behind,
    "data exchanged": _exchanged,
    "through views": _through_views,
    "pairs of rows": _pairs_of_rows,
    "diagonal": _diagonal,
    "chunks": _chunks,
    "split, written": _split_written,
    "strided": _strided,
    "zeros filled": _zeros_filled,
    "accumulated": _accumulated,
    "addmm": _addmm,
    "foreach": _foreach,
    "out": _out,
    "activations in place": _relu_and_co,
    "fill": _fill,
    "masked write": _masked_write,
    "masked scale": _masked_scale,
    "index_put": _index_put,
    "rows": _rows,
    "masked_scatter": _masked_scatter,
    "selected sum": _selected_sum,
    "branch": _branch,
    "item": _item,
    "loop": _loop,
    "to list": _to_list,
    "chosen layer": _chosen_layer,
    "experts": _experts,
    "looked up": _looked_up,
    "one hot": _one_hot,
    "straight through": _straight_through,
    "hard gate": _hard_gate,
    "without grad": _without_grad,
    "data": _data,
    "max removed": _max_removed,
    "fft": _fft,
    "power spectrum": _power_spectrum,
    "rotated": _rotated,
    "modulus": _modulus,
    "complex, written": _complex_written,
    "complex weights": _wirtinger,
    "solve": _solve,
    "inverse": _inverse,
    "matrix_exp": _matrix_exp,
    "cholesky": _cholesky,
    "cell": _cell,
    "multihead": _multihead,
    "attention": _flash,
    "batch norm": lambda m, x: m.norm(x),
    "cube": lambda m, x: Cube.apply(x, 0.3),
    "pair": lambda m, x: torch.mul(*Pair.apply(x, m.scale)) + 0.5 * x,
    "surrogate": lambda m, x: Surrogate.apply(x) * 0.5 + x,
    "derivative": _derivative,
    "inner step": _inner_step,
    "first-order step": _first_order_step,
    "torch.func.grad": _functional,
    "torch.func.jvp": _pushed,
    "vmap": _vmapped,
    "checkpoint": _checkpointed,
    "noise": _noise,
    "bernoulli": _bernoulli,
    "reparametrized": _reparametrized,
    "shuffled": _shuffled,
    "dropout": _of(lambda x: F.dropout(x, 0.4)),
    "dropout unread": _dropout_unread,
    "alpha dropout": _of(lambda x: F.alpha_dropout(x, 0.3, training=True)),
    "rrelu": _of(lambda x: F.rrelu(x, training=True)),
    "gumbel": _of(lambda x: F.gumbel_softmax(x, hard=True)),
    "sampled": _sampled,
    "logcumsumexp": _of(lambda x: torch.logcumsumexp(x, 1)),
    "cumprod": _of(lambda x: torch.cumprod(x.tanh() + 1.5, 1)),
    "prod": _of(lambda x: x + x.tanh().prod(-1, keepdim=True)),
    "cummax": _of(lambda x: torch.cummax(x, 1)[0]),
    "sort": _of(lambda x: torch.sort(x, 1, descending=True)[0] * torch.arange(1.0, 4.0).to(x)),
    "median": _of(lambda x: x - x.median(-1, keepdim=True)[0]),
    "quantile": _of(lambda x: x - torch.quantile(x, 0.4, -1, keepdim=True)),
    "scatter_reduce": _of(
        lambda x: x.scatter_reduce(1, torch.tensor([[0, 0, 2]], device=x.device).expand(len(x), -1), x.cos(), "prod")
    ),
    "scatter amax": _of(
        lambda x: x.scatter_reduce(1, torch.tensor([[0, 0, 2]], device=x.device).expand(len(x), -1), x.cos(), "amax")
    ),
    "scatter mean": _of(
        lambda x: x.scatter_reduce(1, torch.tensor([[0, 0, 2]], device=x.device).expand(len(x), -1), x.sin(), "mean")
    ),
    "normalize": _of(lambda x: F.normalize(x, p=3.0, dim=-1, eps=1e-2)),
    "cosine": _of(lambda x: x * F.cosine_similarity(x, x.sin() + 0.5, dim=-1)[:, None]),
    "triple product": _of(lambda x: torch.einsum("bi,bj,bk->bk", x, x.sin(), x)),
    "kron": _of(lambda x: torch.kron(x, x.mean(0)[None])[:, ::WIDTH]),
    "conv": lambda m, x: F.conv1d(x[:, None], m.inner.weight[:1, None], padding=1)[:, 0],
    "pool": _of(lambda x: F.max_pool1d(x[:, None], 2, 1, padding=1)[:, 0, :WIDTH]),
    "interpolate": _of(lambda x: F.interpolate(x[:, None], scale_factor=2.0, mode="linear")[:, 0, ::2]),
    "group norm": _of(lambda x: F.group_norm(x[:, :, None].expand(-1, -1, 2) * x[:, :1, None], 1, eps=0.1)[:, :, 0]),
    "trapezoid": _of(lambda x: x + torch.trapezoid(x, dim=1)[:, None]),
    "atan2": _of(lambda x: torch.atan2(x, 2.0 + x.cos())),
    "lgamma": _of(lambda x: torch.lgamma(1.5 + x * x)),
    "bessel": _of(lambda x: torch.special.i1(x.tanh()) + torch.special.bessel_j0(x.detach())),
    "glu": _of(lambda x: F.glu(_four(x).repeat(1, 2)[:, : 2 * WIDTH])),
    "pixel": _of(lambda x: x.unflatten(1, (1, WIDTH)).expand(-1, 2, -1).flatten(1)[:, 1 : WIDTH + 1]),
    "repeat_interleave": _of(lambda x: torch.repeat_interleave(x, 2, 1)[:, 2 : WIDTH + 2]),
    "take_along": _of(lambda x: torch.take_along_dim(x, x.argsort(1), 1)),
    "renorm": _of(lambda x: torch.renorm(x, 2, 0, 0.8)),
    "nan_to_num": _of(lambda x: torch.nan_to_num(torch.where(x > 0, x, torch.nan)) + x),
    "eigenvalues": _of(lambda x: x @ torch.linalg.eigvalsh(x.mT @ x + torch.diag(torch.arange(3.0)).to(x)).diag()),
    "trace": _of(lambda x: x * torch.trace(x @ x.mT)),
    "householder": _of(lambda x: x - x.flip(0) @ x.mT @ x * 0.1),
}


# --- writes that other steps see --------------------------------------------------------------------------------------


def _rows_written(m: Any, x: Tensor) -> Tensor:
    x[:, 1:].mul_(0.7)
    return x


def _returns_a_view(m: Any, x: Tensor) -> Tensor:
    x.t()[0].add_(0.3)
    return x.t().t()


def _sees_itself(m: Any, x: Tensor) -> Tensor:
    other = x.view(-1)
    x += 0.2
    return other.view_as(x) + x[:, :1]


def _added_below(m: Any, x: Tensor, y: Tensor) -> Tensor:
    x.add_(y, alpha=0.5)
    return x


def _unseen(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x[:, 0] += 0.2
    return x


def _stored(m: Any, x: Tensor) -> Tensor:
    m.calls.append(x[:, 1:])
    if len(m.calls) > 1:
        m.calls[-2].add_(0.1)
    return x


ACROSS: dict[str, Step] = {
    "add_": lambda m, x: x.add_(0.3),
    "mul_": lambda m, x: x.mul_(0.7),
    "rows written": _rows_written,
    "returns a view": _returns_a_view,
    "sees itself": _sees_itself,
    "unseen": _unseen,
    "stored": _stored,
    "identity": lambda m, x: x,
    "view": lambda m, x: x.view(-1).view(x.shape),
    "relu_": lambda m, x: F.relu_(x),
    "tanh_": lambda m, x: x.tanh_(),
    "sigmoid_": lambda m, x: x.sigmoid_(),
    "flipped": lambda m, x: x.flip(1),
    "wave": lambda m, x: x.sin(),
    "masked_fill_": lambda m, x: x.masked_fill_(x.detach() > 0.7, 0.2),
    "detached view": lambda m, x: x.detach()[:, :1] + x,
    "copy": lambda m, x: torch.empty_like(x).copy_(x),
    "neg_ of a part": lambda m, x: (x[:1].neg_(), x * 1.0)[1],
    "zero_ of a column": lambda m, x: (x[:, 2].zero_(), x)[1],
}
ACROSS_TWO: dict[str, Step] = {
    "added below": _added_below,
    "copied over": lambda m, x, y: x.copy_(y),
    "column set": lambda m, x, y: (x[:, 0].copy_(y[:, 1]), x)[1],
    "product": lambda m, x, y: x * y,
    "lerp_": lambda m, x, y: x.lerp_(y, 0.3),
    "larger, scaled": lambda m, x, y: torch.maximum(x, y).mul_(0.9),
}
