"""What a forward may do besides computing: every situation against double-backward of the model as it is."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import dag_hesse as dh
from dag_hesse import errors
from tests import device
from tests.oracle import error
from tests.property.steps.parts import Cube

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(5)).double().to(device.NAME)
Y = torch.tensor([0, 1, 2, 0], device=device.NAME)


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    """Tensors that a forward makes lie where the tests run."""
    with torch.device(device.NAME):
        yield


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


class Once(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * ctx.factor * g * x**2, None


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


def _branch(m: Any, z: Tensor) -> Tensor:
    if z.sum() > 0:
        return z.sin()
    return z.cos() * z.abs().max().item()


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


def _unread_dropout(m: Any, z: Tensor) -> Tensor:
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


def _module_in_a_list(m: Any, z: Tensor) -> Tensor:
    return m.fn(z, 0.5)


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.b = nn.Embedding(6, 3, max_norm=0.5), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.e(x).sin())


def _linear(*parts: Any) -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(4, 4)


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
    "branch and item": lambda: Around(_branch),
    "boolean masks": lambda: Around(_masked),
    "fill_diagonal_": lambda: Around(lambda m, z: (z * z).fill_diagonal_(0.3) + z),
    "FFT": lambda: Around(_fft, filter=torch.tensor([1.0, 0.5, 0.25])),
    "conjugates": lambda: Around(
        lambda m, z: (torch.fft.fft(z) * torch.fft.fft(z).conj() + torch.fft.fft(z).conj() + z).real
    ),
    "determinant": lambda: Around(lambda m, z: z * torch.linalg.det((z.T @ z) * 0.0 + z)),
    "rotation by complex numbers": lambda: Around(_rotary),
    "straight-through": lambda: Around(_straight_through),
    "checkpoints": lambda: Around(_checkpointed, c=_linear()),
    "dropout that nobody reads": lambda: Around(_unread_dropout),
    "noise": lambda: Around(_noise),
    "RReLU": lambda: Around(lambda m, z: F.rrelu(z, training=True) * F.rrelu(z) + F.rrelu_(z.clone(), 0.1, 0.2)),
    "complex parts at odd offsets": lambda: Around(
        lambda m, z: torch.cat([z[:, :1], torch.view_as_real(torch.fft.rfft(z)).flatten(1)], 1)[:, :4]
    ),
    "an integer parameter": lambda: Around(lambda m, z: z * m.n, n=nn.Parameter(torch.tensor(2), requires_grad=False)),
    "a generator of its own": lambda: Around(_own_generator, g=torch.Generator(device.NAME)),
    "autograd.grad inside": lambda: Around(_derivative, c=_linear()),
    "torch.func inside": lambda: Around(_functional_derivative, c=_linear()),
    "MAML": lambda: Around(_maml, c=_linear()),
    "distributions": lambda: Around(_distribution),
    "NumPy": lambda: Around(_numpy),
    "custom function": lambda: Around(_module_in_a_list, fn=Cube.apply),
    "custom function of two outputs": lambda: Around(lambda m, z: torch.mul(*TwoOutputs.apply(z)) + z),
    "spectral norm": lambda: Around(
        lambda m, z: m.c(z), c=nn.utils.parametrizations.spectral_norm(_linear(), n_power_iterations=2)
    ),
    "weight norm": lambda: Around(lambda m, z: m.c(z), c=nn.utils.parametrizations.weight_norm(_linear())),
    "orthogonal": lambda: Around(lambda m, z: m.c(z), c=nn.utils.parametrizations.orthogonal(_linear())),
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


# --- what stays behind ------------------------------------------------------------------------------------------------


class Fails(nn.Module):
    """Changes everything that it can, then fails if it is told to."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fail, self.seen, self.cache = fail, [0], {"k": [1]}
        self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(4, 3), nn.BatchNorm1d(4)
        self.register_buffer("k", torch.tensor(0.0))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        self.k += 1
        self.seen.append(self.k)
        self.cache["k"].append(2)
        self.cache["new"] = x
        self.a.weight.data = self.a.weight.data * 2
        with torch.no_grad():
            self.b.bias.add_(1.0)
        self.extra = x
        np.random.rand()
        torch.rand(1)
        self.a(x).sum().backward(retain_graph=True)
        if self.fail:
            raise ValueError("as told")
        return self.b(self.norm(self.a(x)).sin())


def _picture(model: Fails) -> Any:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {n: (id(t), t.data_ptr(), t._version, t.requires_grad, t.detach().clone()) for n, t in tensors.items()}
    return kept, list(model.seen), copy.deepcopy(model.cache), sorted(vars(model)), [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ], [p.grad for p in model.parameters()]  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "capture": lambda m, b: dh.capture(m, b),
    "structure": lambda m, b: dh.structure(m, b),
    "analyze": lambda m, b: dh.analyze(m, b, points=["a", "norm"]),
    "per sample": lambda m, b: dh.analyze(m, b, batch_mode="per_sample"),
    "operator": lambda m, b: dh.HessianOperator(m, b).dense(),
    "hvp": lambda m, b: dh.hvp(m, b, torch.ones(39).double()),
    "GGN": lambda m, b: dh.GGNOperator(m, b) @ torch.ones(39).double(),
    "no proof": lambda m, b: dh.HessianOperator(m, b, verify="none").dense(),
    "profile": lambda m, b: dh.profile(m, b),
    "unknown point": lambda m, b: dh.analyze(m, b, points=["nowhere"]),
    "unknown output": lambda m, b: dh.analyze(m, b, output="nowhere"),
    "wrong vector": lambda m, b: dh.hvp(m, b, torch.ones(3).double()),
    "bad loss": lambda m, b: dh.analyze(m, b, loss=lambda o, t: o),
    "failing loss": lambda m, b: dh.analyze(m, b, loss=lambda o, t: o.nowhere),
    "constant loss": lambda m, b: dh.analyze(m, b, loss=lambda o, t: torch.ones(()).double()),
}


@pytest.mark.parametrize("fail", [False, True], ids=["", "failing"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_of_a_run_stays_behind(call: str, training: bool, fail: bool) -> None:
    model, x = Fails(fail).train(training), X.clone()
    before, states = _picture(model), (torch.get_rng_state(), np.random.get_state()[1].copy())
    try:
        CALLS[call](model, (x, Y))
        assert not fail
    except errors.DagHesseError:
        pass
    assert _same(_picture(model), before)
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)


# --- what is refused ----------------------------------------------------------------------------------------------------


def _hooked(m: Any, z: Tensor) -> Tensor:
    z = z * 1.0
    z.register_hook(lambda g: 2 * g)
    return z


def test_a_hook_that_changes_gradients_is_found_out() -> None:
    with pytest.raises(errors.UnfaithfulCaptureError, match=r"gradient differs from autograd's at 'a\.weight'"):
        dh.HessianOperator(Around(_hooked), (X, Y))
    assert dh.HessianOperator(Around(_hooked), (X, Y), verify="none").shape == (31, 31)


def test_a_function_that_cannot_be_differentiated_twice_is_named() -> None:
    with pytest.raises(errors.NonDifferentiableError, match=r"function\.Once.*test_capture\.py:\d+"):
        dh.HessianOperator(Around(_module_in_a_list, fn=Once.apply), (X, Y))


def test_a_scripted_module_is_refused_by_name() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(3, 3).double()))
    with pytest.raises(errors.CaptureError, match="submodule '0' is scripted"):
        dh.HessianOperator(model, (X, Y))


def test_gradients_divided_by_frequencies_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True))
    with pytest.raises(errors.CaptureError, match="scale_grad_by_freq"):
        dh.HessianOperator(model, (torch.tensor([0, 1, 1, 2]), Y))


def test_a_tensor_with_a_past_from_outside_is_refused() -> None:
    outside = torch.ones(4, requires_grad=True).double() * 2
    with pytest.raises(errors.CaptureError, match=r"computed before, with a gradient.*test_capture\.py:\d+"):
        dh.HessianOperator(Around(lambda m, z: z * outside), (X, Y))


# --- wrappers, threads, other batches -----------------------------------------------------------------------------------


def test_compiled_models_are_run_op_by_op() -> None:
    plain = Around(lambda m, z: z.sin())
    v = torch.randn(31).double()
    expected = dh.HessianOperator(plain, (X, Y)) @ v
    whole, part = copy.deepcopy(plain), copy.deepcopy(plain)
    whole.compile(backend="eager")
    part.a = torch.compile(part.a, backend="eager")  # type: ignore[assignment]
    for model in (whole, part, torch.compile(copy.deepcopy(plain), backend="eager"), nn.DataParallel(plain)):
        assert error(dh.HessianOperator(model, (X, Y)) @ v, expected) < 1e-13


def test_backward_hooks_do_not_stand_in_the_way() -> None:
    model = Around(lambda m, z: z)
    seen: list[Any] = []
    model.a.register_full_backward_hook(lambda module, into, out: seen.append(1))
    agree(model)


def test_captures_from_several_threads() -> None:
    models = [Around(lambda m, z: F.dropout(z.sin(), 0.0)) for _ in range(4)]
    v, found = torch.randn(31).double(), [torch.zeros(0)] * 4
    expected = dh.HessianOperator(models[0], (X, Y)) @ v

    def run(k: int) -> None:
        found[k] = dh.HessianOperator(models[k], (X, Y)) @ v

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(error(one, expected) < 1e-13 for one in found)


def test_a_batch_that_takes_another_way_is_captured_anew() -> None:
    model = Around(_branch)
    batches = [(X, Y), (-3 * X, Y)]
    parts = [truth(model, batch, ("a.weight", "a.bias", "b.weight", "b.bias")) for batch in batches]
    with pytest.warns(UserWarning, match="captured anew"):
        found = dh.HessianOperator(model, batches).dense()
    assert error(found, sum(parts) / 2) < 1e-10


def test_refresh_takes_the_way_that_new_values_take() -> None:
    model = Around(_branch)
    operator = dh.HessianOperator(model, (X, Y))
    operator.dense()
    with torch.no_grad():
        model.a.weight.neg_()
        model.a.bias.neg_()
    operator.refresh()
    with pytest.warns(UserWarning, match="captured anew"):
        found = operator.dense()
    assert error(found, truth(model, (X, Y), operator.names)) < 1e-10


def test_batches_of_values_that_left_torch_do_not_share_a_graph() -> None:
    class Scaled(Around):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.from_numpy(np.abs(x.cpu().numpy()).max(keepdims=True)).to(x.device)
            return self.b(torch.tanh(self.a(x) * scale))

    model = Scaled(lambda m, z: z)
    batches = [(X, Y), (2 * X, Y)]
    parts = [truth(model, batch, ("a.weight", "a.bias", "b.weight", "b.bias")) for batch in batches]
    assert error(dh.HessianOperator(model, batches).dense(), sum(parts) / 2) < 1e-10


def test_dropout_draws_other_masks_for_every_batch() -> None:
    model = Around(lambda m, z: F.dropout(z, 0.5))
    torch.manual_seed(3)
    operator = dh.HessianOperator(model, [(X, Y), (X, Y)])
    found = operator.dense()
    torch.manual_seed(3)
    parts = [truth(model, (X, Y), operator.names) for _ in range(2)]
    assert error(parts[0], parts[1]) > 1e-2
    assert error(found, sum(parts) / 2) < 1e-10


def test_outputs_that_the_loss_does_not_read_change_nothing() -> None:
    class Features(nn.Module):
        def __init__(self, more: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.more, self.a, self.b, self.c = more, nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.a(x).tanh()
            logits = self.c(self.b(hidden).tanh())
            return {"hidden": hidden, "logits": logits} if self.more else {"logits": logits}

    loss = lambda o, y: F.cross_entropy(o["logits"], y)  # noqa: E731
    few, many = (
        dh.analyze(Features(more), (X, Y), loss=loss, points=["a", "b"], mode="exact") for more in (False, True)
    )
    for part in ("full", "gn", "tensor"):
        assert torch.equal(few.block("a", "a", part), many.block("a", "a", part))


def test_a_model_that_autograd_cannot_differentiate_is_held_against_differences() -> None:
    class Overwritten(Around):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.a(x))
            z[:, 1:] += z[:, :-1].clone()
            return self.b(z)

    class Clean(Around):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.a(x))
            return self.b(torch.cat([z[:, :1], z[:, 1:] + z[:, :-1]], 1))

    found = dh.HessianOperator(Overwritten(lambda m, z: z), (X, Y))
    expected = truth(Clean(lambda m, z: z), (X, Y), found.names)
    assert error(found.dense(), expected) < 1e-10
    columns = torch.randn(31, 3).double()
    assert error(found @ columns, expected @ columns) < 1e-10


def test_a_reentrant_checkpoint_is_nothing_special() -> None:
    inner = lambda m: lambda t: m.c(t).sin()  # noqa: E731
    plain = Around(lambda m, z: inner(m)(z), c=_linear())
    saved = Around(lambda m, z: checkpoint(inner(m), z, use_reentrant=True), c=_linear())
    found = dh.HessianOperator(saved, (X, Y))
    assert error(found.dense(), truth(plain, (X, Y), found.names)) < 1e-10


@pytest.mark.parametrize("verify", ["gradient", "product", "none"])
def test_what_is_proved(verify: str) -> None:
    agree(Around(lambda m, z: z.sin()), verify=verify)
    with pytest.raises(errors.OptionError, match="verify"):
        dh.HessianOperator(Around(lambda m, z: z), (X, Y), verify="everything")


def test_what_is_written_for_integers_is_of_their_batch_only() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.e, self.b = nn.EmbeddingBag(7, 4, mode="mean", padding_idx=0), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.e(x).sin())

    ids = [torch.randint(0, 7, (4, 3), generator=torch.Generator().manual_seed(k), device="cpu") for k in range(2)]
    batches = [(x.to(device.NAME), Y) for x in ids]
    model = Bags()
    singles = [dh.HessianOperator(model, batch).dense() for batch in batches]
    assert error(dh.HessianOperator(model, batches, reduction="mean").dense(), sum(singles) / 2) < 1e-12
    assert dh.capture(model, (ids[0].to(device.NAME).clamp(min=1), Y), points=["e"]).points[0].shape == (4,)


@pytest.mark.parametrize("loss", ["ctc", "packed"])
def test_lengths_are_of_their_batch_only(loss: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.r, self.o = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            out, _ = nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True, total_length=3)
            return self.o(out.sum(1)) if loss == "packed" else self.o(out)

    def ctc(o: Tensor, y: Tensor) -> Tensor:
        return F.ctc_loss(
            o.log_softmax(-1).transpose(0, 1), y.clamp(min=1)[:, None], torch.full((4,), 3), torch.ones(4).long()
        )

    x = torch.randn(4, 3, 3).double()
    batches = [
        ((x, torch.tensor(n)), torch.tensor(y)) for n, y in (([3, 2, 1, 3], [0, 1, 2, 0]), ([1, 2, 3, 1], [2, 2, 1, 1]))
    ]
    model = Recurrent()
    options: Any = {"loss": ctc if loss == "ctc" else None, "reduction": "mean"}
    singles = [dh.HessianOperator(model, batch, **options).dense() for batch in batches]
    assert error(singles[0], singles[1]) > 1e-2
    assert error(dh.HessianOperator(model, batches, **options).dense(), sum(singles) / 2) < 1e-12


def test_constants_of_a_batch_are_those_of_its_own_random_draws() -> None:
    def between(m: Any, z: Tensor) -> Tensor:
        z = F.dropout(z, 0.5)
        return z * torch.tensor(z.detach().mean(0).tolist()).to(z)

    model = Around(between)
    torch.manual_seed(4)
    operator = dh.HessianOperator(model, [(X, Y), (2 * X, Y)])
    found = operator.dense()
    torch.manual_seed(4)
    parts = [truth(model, batch, operator.names) for batch in ((X, Y), (2 * X, Y))]
    assert error(found, sum(parts) / 2) < 1e-10


def test_a_loss_that_reads_a_parameter_beside_the_output_has_no_parts() -> None:
    model = Around(lambda m, z: z.sin(), s=nn.Parameter(torch.tensor(0.3)))
    weighted = lambda o, y: (-model.s).exp() * F.cross_entropy(o, y) + model.s  # noqa: E731
    added = lambda o, y: F.cross_entropy(o, y) + model.s.square() + model.a.weight.square().sum()  # noqa: E731
    with pytest.raises(errors.CaptureError, match=r"mul.*beside it.*HessianOperator"):
        dh.GGNOperator(model, (X, Y), loss=weighted)
    whole = dh.HessianOperator(model, (X, Y), loss=weighted)
    assert whole.shape == (32, 32)
    gn, _ = dh.HessianOperator(model, (X, Y), loss=added).parts(torch.eye(32).double())
    plain = dh.GGNOperator(model, (X, Y), param_filter=["a.*", "b.*"]).dense()
    assert error(gn[1:, 1:] if whole.names[0] == "s" else gn[:-1, :-1], plain) < 1e-12
    assert dh.analyze(model, (X, Y), loss=weighted, points=["a", "b"]).resonance.all()
