"""Elementwise programs: every instruction and every rule that can be recorded against plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dag_hesse as dh
from dag_hesse.kernels import machine
from dag_hesse.kernels.arena import SYSTEM, Arena
from dag_hesse.kernels.program import Builder, Program, Refused, cpp, record, reference, run
from dag_hesse.kernels.program.build import ROWS
from dag_hesse.rules import RULES, chain, special
from tests.oracle import error
from tests.rules.samples import SAMPLES
from tests.rules.test_rules import make_call

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
SPECIAL = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-30,
    -1e-30,
    1e30,
    -1e30,
    88.72,
    88.73,
    -87.4,
    -103.0,
    0.625,
    -0.625,
    4.0,
    -4.0,
    88.6,
    -105.0,
]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results start as NaN, so that an element that is never written shows."""
    monkeypatch.setattr(Arena, "blank", lambda self, like: torch.empty_like(like).fill_(math.nan))
    yield


def _one(name: str, number: float) -> tuple[Program, int]:
    """A program of one instruction, and its number of operands."""
    arity = {"fma": 3, "fnma": 3, "where": 3, "add": 2, "sub": 2, "mul": 2, "div": 2, "fill": 0}.get(name, 1)
    b, number = Builder(arity), 1 if name in ROWS else number  # axes of a row
    return b.program([b.emit(name, *map(b.operand, range(arity)), number=number)]), arity


@TYPES
@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 100_001])
@pytest.mark.parametrize("name", [*reference.INSTRUCTIONS, "fill"])
def test_an_instruction_does_what_its_definition_does(name: str, size: int, dtype: torch.dtype, poisoned: None) -> None:
    torch.manual_seed(0)
    program, arity = _one(name, 0.3)
    operands = [3 * torch.randn(size, dtype=dtype) for _ in range(arity)]
    if name in ("log", "sqrt"):
        operands = [x.abs() + 0.1 for x in operands]
    like = torch.empty(size, dtype=dtype)
    exact = reference.run(SYSTEM, program, [x.double() for x in operands], like.double())[0]
    assert error(run(SYSTEM, program, operands, like)[0].double(), exact, 1.0) < TOLERANCE[dtype]


@TYPES
@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid", "erf", "abs", "where", "gt_i", "le_i", "rdiv_i"])
def test_special_points_are_torchs(name: str, dtype: torch.dtype) -> None:
    program, arity = _one(name, 0.0)
    x = torch.tensor(SPECIAL, dtype=dtype)
    operands = [x, x.flip(0), -x][:arity]
    found, expected = run(SYSTEM, program, operands, x)[0], reference.run(SYSTEM, program, operands, x)[0]
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid", "erf"])
def test_functions_are_good_to_some_ulps(name: str) -> None:
    program, _ = _one(name, 0.0)
    x = torch.cat([torch.linspace(-20, 20, 400_001), torch.logspace(-30, 0, 1000), -torch.logspace(-30, 0, 1000)])
    exact = reference.run(SYSTEM, program, [x.double()], x.double())[0]
    off = (run(SYSTEM, program, [x], x)[0].double() - exact).abs() / exact.abs()
    assert off.max() < 4 * 2**-23


@TYPES
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    kept=st.lists(st.booleans(), min_size=4, max_size=4),
    order=st.permutations(range(4)),
    other=st.permutations(range(4)),
)
@settings(max_examples=60, deadline=None)
def test_operands_of_any_layout(
    dtype: torch.dtype, shape: list[int], kept: list[bool], order: list[int], other: list[int]
) -> None:
    def laid_out(sizes: list[int], axes: list[int]) -> Tensor:
        axes = [axis for axis in axes if axis < len(sizes)]
        return torch.randn([sizes[axis] for axis in axes], dtype=dtype).permute(
            [axes.index(k) for k in range(len(axes))]
        )

    like = laid_out(shape, order)
    spread = laid_out([n if keep else 1 for n, keep in zip(shape, kept, strict=False)], other)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    b = Builder(3)
    total = b.fused(b.operand(0), b.operand(1), b.operand(2))
    program = b.program([b.dense(b.multiply(total, 2.0)), b.dense(total)])
    found = run(SYSTEM, program, [like, spread, wide], like)
    for x, y in zip(found, reference.run(SYSTEM, program, [like, spread, wide], like), strict=True):
        assert x.stride() == like.stride()
        torch.testing.assert_close(x, y)


@TYPES
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    axes=st.integers(1, 2),
    kept=st.lists(st.booleans(), min_size=4, max_size=4),
    order=st.permutations(range(4)),
    narrow=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_rows_and_numbers_of_any_layout(
    dtype: torch.dtype, shape: list[int], axes: int, kept: list[bool], order: list[int], narrow: bool
) -> None:
    axes = min(axes, len(shape))
    x = torch.randn(shape, dtype=dtype)
    order = [axis for axis in order if axis < len(shape)]
    other = torch.randn([shape[axis] for axis in order], dtype=dtype).permute(
        [order.index(k) for k in range(len(order))]
    )
    lead = [n if keep else 1 for n, keep in zip(shape[: len(shape) - axes], kept, strict=False)]
    number = torch.randn(lead, dtype=dtype)[(..., *(None,) * axes)]
    b = Builder(3)
    total = b.emit("row_sum", b.dense(b.multiply(b.operand(0), b.operand(1))), number=axes)
    moved = b.dense(b.fused(total, b.operand(2), b.operand(0)))
    mean = b.emit("row_mean", moved, number=axes)
    program = b.program([moved, mean], [mean] if narrow else [])
    for found, expected in zip(
        cpp.run(SYSTEM, program, [x, other, number], x),
        reference.run(SYSTEM, program, [x, other, number], x),
        strict=True,
    ):
        assert found.shape == expected.shape
        assert error(found, expected, 1.0) < 10 * TOLERANCE[dtype]


def test_functions_of_rows_are_recorded() -> None:
    x = torch.randn(4, 3, 5)
    named = record(lambda x: {"y": x - x.mean([-1, 1], keepdim=True), "s": x.sum((1, 2), keepdim=True)}, [x], x)
    y, s = cpp.run(SYSTEM, named.program, [x], x)
    torch.testing.assert_close(y, x - x.mean([1, 2], keepdim=True))
    torch.testing.assert_close(s, x.sum([1, 2], keepdim=True))
    for code in (
        lambda x: x - x.sum(-1),
        lambda x: x - x.sum(1, keepdim=True),
        lambda x: x.sum() * x,
        lambda x: x - x.sum(-1, keepdim=True) - x.sum([1, 2], keepdim=True),
        lambda x: x * (x.sum(-1, keepdim=True) * 2).mean(-1, keepdim=True),  # of numbers, not of rows
    ):
        with pytest.raises(Refused):
            record(lambda x, code=code: {"y": code(x)}, [x], x)
    with pytest.raises(Refused, match="whole"):
        record(lambda x: {"a": x.sum(-1, keepdim=True), "b": x.sum(-1, keepdim=True) * torch.ones_like(x)}, [x], x)


def test_a_program_on_rows_is_given_rows() -> None:
    b = Builder(1)
    program = b.program([b.emit("row_sum", b.operand(0), number=1)])
    for sizes, row in (([4, 6], 5), ([4, 6], 0), ([4, 6], 12)):
        with pytest.raises(ValueError, match="last axes"):
            program.compiled.run(True, sizes, [(0, [6, 1])], [0], 1, row)


def test_registers_are_reused() -> None:
    b = Builder(1)
    x = b.operand(0)
    for _ in range(20):
        x = b.apply("tanh", b.add(x, 1.0))
    assert b.program([x]).registers == 1
    y = b.apply("exp", b.operand(0))
    assert b.program([y]).rows == (("exp", (1, 0), 0.0),)  # what no result comes of is left out


def test_a_clamp_to_both_sides_is_recorded() -> None:
    x = torch.randn(4, 3)
    named = record(lambda x: {"y": torch.nn.functional.hardtanh(x, -0.5, 0.7) * x}, [x], x)
    torch.testing.assert_close(run(SYSTEM, named.program, [x], x)[0], x.clamp(-0.5, 0.7) * x)


def test_what_is_no_elementwise_program_is_refused() -> None:
    x, other = torch.randn(4, 3), torch.randn(4, 3)
    with pytest.raises(Refused, match="cumsum"):
        record(lambda x: {"y": x.cumsum(0)}, [x], x)
    with pytest.raises(Refused, match="no operand"):
        record(lambda x: {"y": x * other}, [x], x)
    with pytest.raises(Refused, match="scalar_dense"):  # a choice by values
        record(lambda x: {"y": x.exp() if x > 0 else x}, [x[0, 0]], x[0, 0])
    with pytest.raises(Refused, match="bool"):
        record(lambda x: {"y": x * x.bool()}, [x], x)
    with pytest.raises(Refused, match="bool"):
        record(lambda x: {"y": x * ((x > 0) + (x < 1))}, [x], x)
    with pytest.raises(Refused, match="smaller"):
        record(lambda x, row: {"y": row.exp()}, [x, x[0]], x)
    with pytest.raises(Refused, match="dtype"):
        record(lambda x: {"y": x.double()}, [x], x)
    with pytest.raises(ValueError, match="no such instruction"):
        Program((("cumsum", (1, 0), 0.0),), 1, (False,), 0).compiled  # noqa: B018
    with pytest.raises(ValueError, match="not written to"):
        Program((("exp", (0, 0), 0.0),), 1, (False,), 0).compiled  # noqa: B018


NONLINEAR = [
    pytest.param(name, sample, id=f"{name}-{k}")
    for name, found in SAMPLES.items()
    for k, sample in enumerate(found)
    if RULES[name].partials is not None and RULES[name].pairs(make_call(name, sample).node)
]
# Ops with no instruction, or with operands that are none: their partials are taken op by op.
BY_OP = {
    "sin", "cos", "tan", "sinh", "cosh", "atan", "asin", "acos", "expm1", "log1p", "log2", "log10", "exp2",
    "softplus", "mish", "log_sigmoid_forward", "batch_affine", "hardswish", "elu", "selu", "celu",
    *({name.split(".")[1] for name in special.TABLE} - {"special_ndtr"}),  # that one is written with erf
}  # fmt: skip


@TYPES
@pytest.mark.parametrize("name, sample", NONLINEAR)
def test_partials_of_rules_recorded_and_op_by_op(
    name: str, sample: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    call = make_call(name, sample, dtype)  # type: ignore[arg-type]
    exact = make_call(name, sample, dtype)  # type: ignore[arg-type]
    variables = [slot for slot, on in enumerate(call.active) if on]
    place = len(call.values)
    found = []
    for least, one in ((0, call), (1 << 60, exact)):
        monkeypatch.setattr(machine.CPU, "program", least)
        monkeypatch.setattr(chain, "_PROGRAMS", {})
        values = tuple(v.double() if least and v.is_floating_point() else v for v in call.values)
        known = dict(enumerate([*values, call.value.double() if least else call.value]))
        fused = chain.fuse_members([(place, one.node)], known, variables)
        lam = torch.linspace(-1, 2, call.value.numel(), dtype=torch.float64 if least else dtype).reshape(
            call.value.shape
        )
        found.append((fused, fused.descend(lam, variables)))
    (recorded, mine), (_, theirs) = found
    plain = name.split(".")[1] in BY_OP
    if len(variables) == 1 and all(v.is_floating_point() and v.shape == call.value.shape for v in call.values):
        by_op = not isinstance(recorded, chain._Recorded)
        told = f"{name}: partials run op by op: {by_op}; it is named in BY_OP: {plain}"
        assert by_op == plain or "pow" in name, told  # as the exponent may be
    for a, b in ((mine.first, theirs.first), (mine.second, theirs.second), (mine.pulled, theirs.pulled)):
        assert {k for k, v in a.items()} == {k for k, v in b.items()}
        for k in a:
            x, y = (torch.as_tensor(v, dtype=torch.float64) for v in (a[k], b[k]))
            assert error(x, y.expand(x.shape), 1e-2) < (1e-5 if dtype is torch.float32 else 1e-12)


class Activations(torch.nn.Module):
    """Smooth activations, a gate, a user's own formula and functions of rows between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(6))
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f = self.layers
        x = torch.nn.functional.gelu(a(x))
        x = torch.nn.functional.gelu(b(x), approximate="tanh")
        x = torch.nn.functional.silu(c(x)) * d(x)
        x = 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0))))
        x = self.norm(x) + torch.softmax(x, -1) * torch.log_softmax(x, -1)
        return f(torch.sigmoid(e(x)).square() + x)


@pytest.mark.parametrize("space", ["parameter", "activation"])
def test_products_with_programs_are_those_without(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = Activations().double(), (torch.randn(5, 8).double(), torch.randn(5, 8).double())
    products, programs = [], dict[object, object]()
    monkeypatch.setattr(chain, "_PROGRAMS", programs)
    for least in (1 << 60, 0):
        monkeypatch.setattr(machine.CPU, "program", least)
        monkeypatch.setattr(machine.CPU, "rows", least)
        monkeypatch.setattr(machine.CPU, "norm", least)
        H = dh.HessianOperator(model, batch, space=space)
        v = torch.randn(H.shape[1], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        products.append(H.parts(v))
        assert bool(programs) == (least == 0)
    assert any(programs.values())
    for plain, recorded in zip(*products, strict=True):
        torch.testing.assert_close(recorded, plain, rtol=1e-11, atol=1e-13)
