"""The fallback on ops of every kind: real, complex, of several results, custom, and ones that are not to be trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dag_hesse.errors import NonDifferentiableError
from dag_hesse.ir import Kind, Node, Ref
from dag_hesse.rules import Call, Linearized
from dag_hesse.rules.base import ALL
from dag_hesse.rules.opaque import OPAQUE, second_order_fault
from tests import device
from tests.oracle import error
from tests.rules.products import bind, jvp, second, vjp

aten = torch.ops.aten
F64, C128 = torch.float64, torch.complex128


def call_of(target: Callable[..., Any], *args: Any, output: int | None = None, fixed: tuple[int, ...] = ()) -> Call:
    """A call of anything; tensors among the arguments are its inputs."""
    values = [x.to(device.NAME) for x in args if isinstance(x, Tensor)]
    slots = iter(range(len(values)))
    bound = tuple(Ref(next(slots)) if isinstance(x, Tensor) else x for x in args)
    with torch.no_grad():
        out = target(*(values[a.slot] if isinstance(a, Ref) else a for a in bound))
    out = out if output is None else out[output]
    places = tuple(range(len(values)))
    node = Node(len(values), str(target), target, bound, {}, places, tuple(out.shape), out.dtype, Kind.OPAQUE, output)
    on = tuple(slot not in fixed and (v.is_floating_point() or v.is_complex()) for slot, v in enumerate(values))
    return Call(node, tuple(values), out, on)


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def inner(a: Tensor, b: Tensor) -> float:
    return float((real(a) * real(b)).sum())


class Cube(torch.autograd.Function):
    """Its own backward is what counts: that of 2x³, and it does not have a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 6 * x * x * g


class Once(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Cube.backward(ctx, g)


class Clipped(torch.autograd.Function):
    """A backward that is not linear in what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.1, 0.1)


class Lopsided(torch.autograd.Function):
    """A backward that is no function's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        _, y = ctx.saved_tensors
        return g * y, torch.zeros_like(y)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def normal(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(device.NAME)


def waves(*shape: int) -> Tensor:
    return normal(*shape, dtype=C128)


SMOOTH: dict[str, Callable[[], Call]] = {
    "logcumsumexp": lambda: call_of(aten.logcumsumexp.default, normal(3, 4), 1),
    "cumprod": lambda: call_of(aten.cumprod.default, normal(3, 4), 1),
    "solve": lambda: call_of(torch.linalg.solve, normal(3, 3) + 3 * torch.eye(3, device=device.NAME), normal(3, 2)),
    "inverse": lambda: call_of(aten.linalg_inv_ex.default, normal(3, 3), output=0),
    "eigenvalues": lambda: call_of(lambda x: torch.linalg.eigh(x + x.mT), normal(3, 3), output=0),
    "fft of real": lambda: call_of(aten._fft_r2c.default, normal(3, 5), [1], 0, True),
    "fft of complex": lambda: call_of(aten._fft_c2c.default, waves(3, 4), [0, 1], 1, False),
    "fft to real": lambda: call_of(aten._fft_c2r.default, waves(3, 4), [1], 2, 6),
    "view as real": lambda: call_of(aten.view_as_real.default, waves(3)),
    "view as complex": lambda: call_of(aten.view_as_complex.default, normal(3, 2)),
    "complex product": lambda: call_of(aten.mul.Tensor, waves(3), waves(2, 3)),
    "complex by real": lambda: call_of(aten.mul.Tensor, waves(2, 3), normal(3)),
    "complex matrices": lambda: call_of(aten.mm.default, waves(2, 3), waves(3, 2)),
    "abs": lambda: call_of(aten.abs.default, waves(3)),
    "angle": lambda: call_of(aten.angle.default, waves(3)),
    "conjugate": lambda: call_of(aten._conj_physical.default, waves(3)),
    "real part": lambda: call_of(aten.real.default, waves(3)),
    "imaginary part": lambda: call_of(aten.imag.default, waves(3)),
    "complex exp": lambda: call_of(aten.exp.default, waves(3)),
    "complex of parts": lambda: call_of(aten.complex.default, normal(3), normal(3)),
    "polar": lambda: call_of(aten.polar.default, torch.rand(3, dtype=F64) + 0.1, normal(3)),
    "squared size": lambda: call_of(lambda z: (z * z.conj()).real, waves(3)),
    "one of several": lambda: call_of(lambda x, y: (x + y, x * y.exp()), normal(3), normal(3), output=1),
    "some inputs": lambda: call_of(lambda x, y: x * y.exp(), normal(3), normal(3), fixed=(1,)),
    "identity": lambda: call_of(lambda x: x, normal(3)),
    "writes to its input": lambda: call_of(lambda x: (x + 0).mul_(x).sin_(), normal(3)),
    "custom": lambda: call_of(Cube.apply, normal(3)),
    "straight-through": lambda: call_of(Rounded.apply, normal(3)),
}


def linearized(call: Call) -> tuple[Linearized, list[int]]:
    with torch.no_grad():
        return OPAQUE.linearize(call), [slot for slot, on in enumerate(call.active) if on]


def pullback(call: Call, lam: Tensor, moved: dict[int, Tensor]) -> dict[int, Tensor]:
    """Dᵀλ at moved inputs, by autograd."""
    leaves = {slot: (call.values[slot] + x).detach().requires_grad_() for slot, x in moved.items()}
    values = [leaves.get(slot, v) for slot, v in enumerate(call.values)]
    assert call.node.target is not None
    out = call.node.target(*(values[a.slot] if isinstance(a, Ref) else a for a in call.node.args))
    out = out if call.node.output is None else out[call.node.output]
    found = torch.autograd.grad(out, list(leaves.values()), lam)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("name", SMOOTH)
def test_products_are_those_of_the_ops_own_backward(name: str) -> None:
    torch.manual_seed(0)
    call = SMOOTH[name]()
    lin, slots = linearized(call)
    tangents = {
        slot: torch.randn(2, *call.shape(slot), dtype=call.values[slot].dtype, device=device.NAME) for slot in slots
    }
    adjoints, lam = (
        torch.randn(2, *call.value.shape, dtype=call.value.dtype, device=device.NAME),
        torch.randn_like(call.value),
    )
    pushed, zero = jvp(lin, tangents), {slot: torch.zeros_like(call.values[slot]) for slot in slots}
    assert pushed.shape == (2, *call.value.shape)
    assert pushed.dtype == call.value.dtype
    for g, row in zip(adjoints, pushed, strict=True):
        expected = pullback(call, g, zero)
        k = int(torch.equal(g, adjoints[1]))
        total = sum(inner(expected[slot], tangents[slot][k]) for slot in slots)
        assert abs(total - inner(row, g)) < 1e-10 * (1 + abs(total))
        for slot in slots:
            assert error(real(vjp(lin, adjoints, slot)[k]), real(expected[slot]), 1e-3) < 1e-12
    bind(lin, lam)
    pulled = lin.pull(adjoints, lin.push(tangents, False, slots)[1], ALL, slots, {})
    for k in range(2):
        step = {slot: 1e-5 * tangents[slot][k] for slot in slots}
        ahead, back = pullback(call, lam, step), pullback(call, lam, {slot: -x for slot, x in step.items()})
        for slot in slots:
            expected_term = real(ahead[slot] - back[slot]) / 2e-5
            term = second(lin, tangents, slot)
            assert term is not None
            assert error(real(term[k]), expected_term, 1.0) < 1e-7
            both = real(vjp(lin, adjoints, slot)[k] + term[k])
            assert error(real(pulled[slot][k]), both, 1e-3) < 1e-12


@pytest.mark.parametrize("name", [name for name in SMOOTH if name not in ("straight-through", "custom")])
def test_tangents_are_differences(name: str) -> None:
    torch.manual_seed(1)
    call = SMOOTH[name]()
    lin, slots = linearized(call)
    tangents = {
        slot: torch.randn(1, *call.shape(slot), dtype=call.values[slot].dtype, device=device.NAME) for slot in slots
    }

    def at(step: float) -> Tensor:
        values = [v + step * tangents[slot][0] if slot in tangents else v for slot, v in enumerate(call.values)]
        assert call.node.target is not None
        out = call.node.target(*(values[a.slot] if isinstance(a, Ref) else a for a in call.node.args))
        return out if call.node.output is None else out[call.node.output]

    assert error(real(jvp(lin, tangents)[0]), real(at(1e-5) - at(-1e-5)) / 2e-5, 1e-3) < 1e-8


@pytest.mark.parametrize("name", SMOOTH)
def test_what_is_right_has_no_fault(name: str) -> None:
    torch.manual_seed(2)
    assert second_order_fault(SMOOTH[name]()) is None


def test_faults_are_found() -> None:
    torch.manual_seed(3)
    x = normal(4, 3)
    fault = second_order_fault(call_of(Once.apply, x))
    assert fault is not None
    assert "once_differentiable" in fault
    assert "linear" in str(second_order_fault(call_of(Clipped.apply, x)))
    assert "not the derivative" in str(second_order_fault(call_of(Lopsided.apply, x, normal(4, 3))))
    assert "not implemented" in str(second_order_fault(call_of(aten._pdist_forward.default, x)))
    norm = call_of(aten._weight_norm_interface.default, x, torch.ones(4, 1, dtype=F64), 0, output=0)
    assert "not the derivative" in str(second_order_fault(norm))  # it takes the norms for constants
    assert "random" in str(second_order_fault(call_of(aten.bernoulli.default, torch.rand(3))))


def test_kinks_and_low_precision_are_no_faults() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
    assert second_order_fault(call_of(lambda x: torch.relu(x) * x.exp(), x)) is None
    for dtype in (torch.float32, torch.bfloat16):
        assert second_order_fault(call_of(lambda x: x.exp() * x, x.to(dtype))) is None
    only_single = call_of(lambda x: (x.exp() if x.dtype is torch.float32 else 1 / 0) * x, x.float())
    assert second_order_fault(only_single) is None


@pytest.mark.parametrize("op", [aten.linalg_cholesky_ex.default, aten._linalg_eigh.default])
def test_ops_that_read_one_triangle_are_no_faults(op: Any) -> None:
    x = normal(3, 3)
    assert second_order_fault(call_of(op, x @ x.mT + torch.eye(3).to(x), output=0)) is None


def test_differences_that_a_near_pole_spoils_are_no_faults() -> None:
    x = torch.tensor([1.0, 1.0, 1e-4], dtype=F64)
    assert second_order_fault(call_of(lambda x: 1 / x, x)) is None


def test_what_cannot_be_linearized_is_refused() -> None:
    for call in (call_of(Clipped.apply, normal(3)), call_of(aten.bernoulli.default, torch.rand(3, dtype=F64))):
        with pytest.raises(NonDifferentiableError):
            OPAQUE.linearize(call)
    lin, _ = linearized(call_of(aten.hardsigmoid.default, normal(3)))
    assert jvp(lin, {0: normal(1, 3)}).shape == (1, 3)
    with pytest.raises(NonDifferentiableError, match="twice"):
        bind(lin, normal(3))
        second(lin, {0: normal(1, 3)}, 0)


def test_nothing_runs_twice_and_no_random_number_is_drawn() -> None:
    runs = 0

    def target(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return Cube.apply(x)

    call = call_of(target, normal(3))
    before = runs
    g, x, state = normal(2, 3), normal(2, 3), torch.get_rng_state()
    lin, _ = linearized(call)
    ran = runs - before
    bind(lin, torch.ones_like(call.value))
    for _ in range(3):
        lin.pull(g, lin.push({0: x}, True, [0])[1], ALL, [0], {})
    assert ran <= 2  # one for the tape, one to see whether there is a forward mode
    assert runs - before == ran
    assert torch.equal(torch.get_rng_state(), state)
