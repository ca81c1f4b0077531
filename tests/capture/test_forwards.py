"""What a forward may do besides computing: every situation against double-backward of the model as it is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dag_hesse as dh
from tests import device
from tests.capture.common import Around, X, Y, agree, branch, linear, module_in_a_list, truth
from tests.oracle import error
from tests.property.steps.parts import Cube


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), (x > 0).double()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


@functools.lru_cache
def _cached(n: int) -> Tensor:
    return torch.arange(float(n)).double()


_GLOBAL: dict[str, Tensor] = {}
_COUNT = 0


def _in_a_global(m: Any, z: Tensor) -> Tensor:
    global _COUNT
    _COUNT += 1
    if "scale" not in _GLOBAL:
        _GLOBAL["scale"] = torch.full((4,), 0.5).double()
    return z * _GLOBAL["scale"] * _COUNT


def _counter(m: Any, z: Tensor) -> Tensor:
    m.k += 1
    return z / m.k


def _ema(m: Any, z: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(z.detach().mean(0), alpha=0.1)
    return z - m.mean


def _attribute(m: Any, z: Tensor) -> Tensor:
    m.calls.append(z)
    m.last = z
    return z + len(m.calls)


def _assigned(m: Any, z: Tensor) -> Tensor:
    m.a.weight.data = torch.renorm(m.a.weight.data, 2, 0, 0.1)
    return m.a(X) + z


def _inside_no_grad(m: Any, z: Tensor) -> Tensor:
    with torch.no_grad():
        m.b.weight.mul_(m.mask)
    return z


def _behind_its_back(m: Any, z: Tensor) -> Tensor:
    w = z * 2
    w.data.mul_(3.0)
    w.detach()[:, 1:].add_(1.0)
    return w * z


def _views(m: Any, z: Tensor) -> Tensor:
    z = z.clone()
    pairs = z.view(2, 2, 4)
    pairs[0].mul_(pairs[1].sigmoid())
    z.t()[1:3].transpose(0, 1).add_(z[:, :2].clone())
    z.diagonal().copy_(z[:, 0].clone().sin())
    z[z > 0.3] *= 0.5
    z[torch.tensor([0, 2])] += 1.0
    z.unsqueeze(0).squeeze_(0)[..., ::2].neg_()
    return z


def _accumulated(m: Any, z: Tensor) -> Tensor:
    index = torch.tensor([[0, 1, 1, 3]] * 4)
    out = torch.zeros(4, 4).double().scatter_add_(1, index, z)
    out.index_add_(0, torch.tensor([0, 1]), z[:2].tanh())
    out.addmm_(z, z.t().contiguous() * 0.1)
    return torch.zeros(4, 4).double().copy_(out) * z


def _out(m: Any, z: Tensor) -> Tensor:
    with torch.no_grad():
        torch.mul(m.u, 2.0, out=m.u)
    return z * m.u


def _masked(m: Any, z: Tensor) -> Tensor:
    o = z.clone()
    o[o <= 0] = o[o <= 0] * 0.2
    return o.index_put((torch.nonzero(z[:, 0] > 0).squeeze(1),), torch.zeros(4).double())


def _fft(m: Any, z: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(z)
    return torch.fft.irfft(spectrum * m.filter, n=4) + torch.view_as_real(spectrum * 1j).square().sum((-1, -2))[:, None]


def _rotary(m: Any, z: Tensor) -> Tensor:
    turned = torch.view_as_complex(z.reshape(4, 2, 2)) * torch.polar(torch.ones(2), torch.arange(2.0)).to(
        torch.complex128
    )
    return torch.view_as_real(turned).flatten(1) + turned.abs().sum(1, keepdim=True)


def _straight_through(m: Any, z: Tensor) -> Tensor:
    return z + (z.round() - z).detach() + (z * z).detach()


def _checkpointed(m: Any, z: Tensor) -> Tensor:
    return checkpoint(lambda t: m.c(t).cos(), z, use_reentrant=False)


def _unused_dropout(m: Any, z: Tensor) -> Tensor:
    F.dropout(z, 0.5)
    torch.rand(3)
    return F.dropout(z, 0.5) * torch.rand_like(z)


def _noise(m: Any, z: Tensor) -> Tensor:
    kept = torch.empty_like(z).bernoulli_(0.7)
    return F.rrelu(z, training=True) * kept + torch.randn(4).double().uniform_() + F.gumbel_softmax(z)


def _own_generator(m: Any, z: Tensor) -> Tensor:
    drawn = torch.rand(4, generator=m.g, dtype=torch.float64)
    return z * drawn + torch.empty_like(z).bernoulli_(0.5, generator=m.g) + torch.randn(4, generator=m.g)


def _derivative(m: Any, z: Tensor) -> Tensor:
    z = z if z.requires_grad else z.requires_grad_()
    (g,) = torch.autograd.grad(m.c(z).tanh().sum(), z, create_graph=True)
    return g * z


def _functional_derivative(m: Any, z: Tensor) -> Tensor:
    energy = lambda t: F.silu(m.c(t)).sum()  # noqa: E731
    return torch.vmap(torch.func.grad(energy))(z) + torch.func.jvp(lambda t: m.c(t).tanh(), (z,), (z.sin(),))[1]


def _maml(m: Any, z: Tensor) -> Tensor:
    weights = dict(m.c.named_parameters())

    def loss(w: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(m.c, w, (z,)).square().mean()

    grads = torch.func.grad(loss)(weights)
    return torch.func.functional_call(m.c, {k: w - 0.1 * grads[k] for k, w in weights.items()}, (z,))


def _distribution(m: Any, z: Tensor) -> Tensor:
    normal = torch.distributions.Normal(z, z.exp())
    return normal.log_prob(torch.zeros(4).double()) + torch.distributions.Categorical(logits=z).entropy()[:, None]


def _numpy(m: Any, z: Tensor) -> Tensor:
    return z * torch.from_numpy(np.cumsum(X.cpu().numpy(), axis=1)[:, :1]).to(z.device)


def _promoted(m: Any, z: Tensor) -> Tensor:
    half = z.float()
    half = half * z.mean()
    return (half.sin() * z + torch.cat([half, z], 1)[:, :4]).double()


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.b = nn.Embedding(6, 3, max_norm=0.5), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.e(x).sin())


SITUATIONS: dict[str, Callable[[], nn.Module]] = {
    "counter in a buffer": lambda: Around(_counter, k=torch.tensor(1.0)),
    "moving average": lambda: Around(_ema, mean=torch.zeros(4)),
    "attributes": lambda: Around(_attribute, calls=[1, 2]),
    "cache by lru_cache": lambda: Around(lambda m, z: z * _cached(4)),
    "cache and counter in globals": lambda: Around(_in_a_global),
    "parameter assigned through .data": lambda: Around(_assigned),
    "parameter masked under no_grad": lambda: Around(_inside_no_grad, mask=torch.tril(torch.ones(3, 4))),
    "writes through .data and detach": lambda: Around(_behind_its_back),
    "writes through views": lambda: Around(_views),
    "accumulation in place": lambda: Around(_accumulated),
    "out=": lambda: Around(_out, u=torch.ones(4)),
    "branch and item": lambda: Around(branch),
    "boolean masks": lambda: Around(_masked),
    "fill_diagonal_": lambda: Around(lambda m, z: (z * z).fill_diagonal_(0.3) + z),
    "FFT": lambda: Around(_fft, filter=torch.tensor([1.0, 0.5, 0.25])),
    "conjugates": lambda: Around(
        lambda m, z: (torch.fft.fft(z) * torch.fft.fft(z).conj() + torch.fft.fft(z).conj() + z).real
    ),
    "determinant": lambda: Around(lambda m, z: z * torch.linalg.det((z.T @ z) * 0.0 + z)),
    "rotation by complex numbers": lambda: Around(_rotary),
    "straight-through": lambda: Around(_straight_through),
    "checkpoints": lambda: Around(_checkpointed, c=linear()),
    "dropout that nobody uses": lambda: Around(_unused_dropout),
    "noise": lambda: Around(_noise),
    "RReLU": lambda: Around(lambda m, z: F.rrelu(z, training=True) * F.rrelu(z) + F.rrelu_(z.clone(), 0.1, 0.2)),
    "RReLU in place": lambda: Around(
        lambda m, z: F.rrelu_(z * 1.0, training=True) + F.rrelu_(z.clone(), 0.2, 0.3, True)
    ),
    "a branch without width": lambda: Around(
        lambda m, z: z + m.q(m.p(z)), p=nn.Linear(4, 0), q=nn.Linear(0, 4, bias=False)
    ),
    "a mask that takes nothing": lambda: Around(
        lambda m, z: torch.zeros_like(z).masked_scatter(z > 100, z.sin()[z > 100]).cos() + z.tanh()
    ),
    "a row at an index without axes": lambda: Around(
        lambda m, z: z * z.index_select(0, torch.tensor(2, device=z.device)).exp() + z.sin()
    ),
    "complex parts at odd offsets": lambda: Around(
        lambda m, z: torch.cat([z[:, :1], torch.view_as_real(torch.fft.rfft(z)).flatten(1)], 1)[:, :4]
    ),
    "an integer parameter": lambda: Around(lambda m, z: z * m.n, n=nn.Parameter(torch.tensor(2), requires_grad=False)),
    "a generator of its own": lambda: Around(_own_generator, g=torch.Generator(device.NAME)),
    "autograd.grad inside": lambda: Around(_derivative, c=linear()),
    "torch.func inside": lambda: Around(_functional_derivative, c=linear()),
    "MAML": lambda: Around(_maml, c=linear()),
    "distributions": lambda: Around(_distribution),
    "NumPy": lambda: Around(_numpy),
    "custom function": lambda: Around(module_in_a_list, fn=Cube.apply),
    "custom function of two outputs": lambda: Around(lambda m, z: torch.mul(*TwoOutputs.apply(z)) + z),
    "spectral norm": lambda: Around(
        lambda m, z: m.c(z), c=nn.utils.parametrizations.spectral_norm(linear(), n_power_iterations=2)
    ),
    "weight norm": lambda: Around(lambda m, z: m.c(z), c=nn.utils.parametrizations.weight_norm(linear())),
    "orthogonal": lambda: Around(lambda m, z: m.c(z), c=nn.utils.parametrizations.orthogonal(linear())),
    "LSTM": lambda: Around(lambda m, z: m.c(z.reshape(2, 2, 4))[0].reshape(4, 4), c=nn.LSTM(4, 4)),
    "GRU, two layers, dropout": lambda: Around(
        lambda m, z: m.c(z.reshape(2, 2, 4))[0].reshape(4, 4), c=nn.GRU(4, 4, 2, dropout=0.3)
    ),
    "attention with dropout": lambda: Around(
        lambda m, z: F.scaled_dot_product_attention(z[None], z[None].sin(), z[None], dropout_p=0.3)[0]
    ),
    "vmap over weights": lambda: Around(
        lambda m, z: torch.vmap(lambda w: z @ w)(m.w).sum(0), w=nn.Parameter(torch.randn(2, 4, 4))
    ),
    "scripted function": lambda: Around(lambda m, z: _scripted(z, 2.0)),
}


@torch.jit.script
def _scripted(t: Tensor, v: float) -> Tensor:
    return (t / v).tanh() * v


# PyTorch's second derivative of these is wrong or missing; its first one decides, by central differences.
BY_DIFFERENCES = {"weight norm"}


def _by_differences(model: nn.Module, names: tuple[str, ...]) -> Tensor:
    own = dict(model.named_parameters())
    sizes = [own[name].numel() for name in names]

    def gradient(shift: Tensor) -> Tensor:
        other = copy.deepcopy(model)
        theirs = [dict(other.named_parameters())[name] for name in names]
        with torch.no_grad():
            for p, s in zip(theirs, shift.split(sizes), strict=True):
                p += s.view_as(p)
        found = torch.autograd.grad(F.cross_entropy(other(X.cpu()), Y.cpu()), theirs)
        return torch.cat([g.flatten() for g in found])

    eye, step = torch.eye(sum(sizes), device="cpu").double(), 1e-5
    return torch.stack([(gradient(step * row) - gradient(-step * row)) / (2 * step) for row in eye])


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_a_forward_does_keeps_its_meaning(name: str) -> None:
    model = SITUATIONS[name]()
    _cached.cache_clear()
    _GLOBAL.clear()
    if name in BY_DIFFERENCES:
        found, there = dh.HessianOperator(model, (X, Y)), copy.deepcopy(model).cpu()
        # On the CPU: CUDA's kernel takes roots in single precision, which differences do not survive.
        assert error(found.dense().cpu(), _by_differences(there, found.names)) < 1e-7
        return
    counted = _COUNT
    torch.manual_seed(0)
    operator = dh.HessianOperator(model, (X, Y))
    for _ in range(2):
        found = operator.dense()
    torch.manual_seed(0)
    assert counted == _COUNT
    assert not _GLOBAL
    expected = truth(model, (X, Y), operator.names)
    globals()["_COUNT"] = counted
    assert error(found, expected) < 1e-10


@pytest.mark.parametrize("name", [n for n in SITUATIONS if n not in BY_DIFFERENCES])
def test_blocks_of_activations_keep_theirs(name: str) -> None:
    model = SITUATIONS[name]()
    report = dh.analyze(
        model, (X, Y), points=["a[0]" if "assigned" in name else "a", "b"], mode="exact", batch_mode="joint"
    )
    assert np.isfinite(report.resonance).all()
    assert report.resonance[0, 0] > 0


def test_a_table_whose_rows_are_renormed_by_the_forward() -> None:
    model = Renormed()
    before = model.e.weight.detach().clone()
    agree(model, (torch.tensor([0, 5, 2, 2]), Y))
    assert torch.equal(before, model.e.weight)
