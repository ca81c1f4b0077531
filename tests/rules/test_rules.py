"""Every row of the rule table against differences, inner products and nested autograd of the op itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dag_hesse.ir.node import Node, Ref, execute
from dag_hesse.kernels import batch_affine, machine
from dag_hesse.kernels.arena import SYSTEM
from dag_hesse.rules import RULES, Call, rowwise
from dag_hesse.rules.base import ALL, as_it_is
from tests import device
from tests.oracle import error
from tests.rules.products import bind, jvp, second, vjp
from tests.rules.samples import SAMPLES, Sample, normal, positive

PROBES = 2
# torch's kernels round 1/6 to float32: hardsigmoid's backward everywhere, both forwards on CUDA
LOOSE = {"aten.hardsigmoid.default": 1e-7}
LOOSE_AT_KINKS = LOOSE | {"aten.copysign.Scalar": 1e-11}  # on CUDA autograd's own zero is a rounded one
LOOSE_FORWARD = {"aten.hardsigmoid.default": 1e-7, "aten.hardswish.default": 1e-7}
ONCE = {"aten.hardsigmoid.default"}  # torch cannot differentiate it twice; it is linear almost everywhere


def _op(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def make_call(name: str, sample: Sample, dtype: torch.dtype = torch.float64, special: float | None = None) -> Call:
    """A call of the op on fresh arguments, all floating-point inputs active."""
    values: list[Tensor] = []

    def place(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            if arg.is_floating_point():
                arg = arg.to(dtype)
                if special is not None and not values:
                    arg.reshape(-1)[0::2] = special
            values.append(arg.to(device.NAME))
            return Ref(len(values) - 1)
        if isinstance(arg, list):
            return [place(item) for item in arg]
        return arg

    args = tuple(place(arg) for arg in sample.make())
    options = dict(sample.options)
    if "dtype" in options:
        options["dtype"] = dtype
    node = Node(
        index=len(values),
        op=name,
        target=_op(name),
        args=args,
        kwargs=options,
        inputs=tuple(range(len(values))),
        shape=(),
        dtype=dtype,
        kind=RULES[name].kind,
        output=sample.output,
    )
    out = execute(node, values)
    node.shape = tuple(out.shape)
    on = (v.is_floating_point() and slot not in sample.fixed for slot, v in enumerate(values))
    return Call(node, tuple(values), out, tuple(on))


def _slots(call: Call) -> list[int]:
    return [slot for slot, on in enumerate(call.active) if on]


def _run(call: Call, changed: dict[int, Tensor]) -> Tensor:
    return execute(call.node, [changed.get(slot, value) for slot, value in enumerate(call.values)])


def _autograd(call: Call, lam: Tensor, tangents: dict[int, Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """(Dᵀλ, Σ_j T·λ ẋ_j) per slot by nested autograd of the op on fresh leaves."""
    leaves = {slot: call.values[slot].clone().requires_grad_() for slot in tangents}
    # What the op may save as its own output must not be a leaf of ours.
    out = _run(call, {slot: leaf + 0 for slot, leaf in leaves.items()})
    zero = {slot: torch.zeros_like(leaf) for slot, leaf in leaves.items()}
    if not out.requires_grad:
        return zero, zero
    order = list(leaves)
    first = torch.autograd.grad(out, [leaves[k] for k in order], lam, create_graph=True, allow_unused=True)
    terms = [(g * tangents[k]).sum() for k, g in zip(order, first, strict=True) if g is not None and g.requires_grad]
    second: Any = [None] * len(order)
    if terms and call.node.op not in ONCE:
        second = torch.autograd.grad(sum(terms), [leaves[k] for k in order], allow_unused=True)
    fill = lambda found: {k: zero[k] if g is None else g.detach() for k, g in zip(order, found, strict=True)}  # noqa: E731
    return fill(first), fill(second)


ROWS = [
    pytest.param(name, sample, id=f"{name}-{k}") for name, found in SAMPLES.items() for k, sample in enumerate(found)
]


def test_the_samples_cover_the_table() -> None:
    assert set(SAMPLES) == set(RULES)


@pytest.mark.parametrize("name, sample", [row for row in ROWS if RULES[row.values[0]].run is not as_it_is])
def test_an_op_evaluated_in_another_layout_is_the_same(name: str, sample: Sample) -> None:
    call = make_call(name, sample)
    turned = call.values[0].mT.contiguous().mT if call.values[0].ndim > 1 else call.values[0]
    for first in (call.values[0], turned):
        found = RULES[name].run(call.node, [first, *call.values[1:]], SYSTEM)
        assert error(found, execute(call.node, [first, *call.values[1:]]), 1e-3) < 1e-12


@pytest.mark.parametrize("sample", SAMPLES["aten.convolution.default"])
def test_a_convolution_rounds_as_the_model_does(sample: Sample) -> None:
    # A ReLU that follows decides by the last bit; in another layout, or as another product, it may decide otherwise.
    # On CUDA a layout is an algorithm of its own, and every convolution keeps the layout that the model gave it.
    call = make_call("aten.convolution.default", sample, torch.float32)
    x, *rest = call.values
    laid = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 and not x.is_cuda else x
    assert torch.equal(RULES["aten.convolution.default"].run(call.node, [laid, *rest], SYSTEM), call.value)


@pytest.mark.parametrize("name, sample", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_products(name: str, sample: Sample, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    call = make_call(name, sample, dtype)
    tolerance = 1e-10 if dtype is torch.float64 else 2e-4
    lin = RULES[name].linearize(call)
    tangents = {slot: torch.randn(PROBES, *call.shape(slot), dtype=dtype, device=device.NAME) for slot in _slots(call)}
    pushed = jvp(lin, tangents)
    assert pushed.shape == (PROBES, *call.value.shape)
    assert pushed.dtype == dtype
    if dtype is torch.float64 and sample.differences:
        for k in range(PROBES):  # jvp by central differences
            step = {slot: 1e-5 * tangent[k] for slot, tangent in tangents.items()}
            ahead = _run(call, {slot: call.values[slot] + d for slot, d in step.items()})
            back = _run(call, {slot: call.values[slot] - d for slot, d in step.items()})
            bound = LOOSE_FORWARD.get(name, 2e-8) if device.NAME.startswith("cuda") else 2e-8
            assert error(pushed[k], (ahead - back) / 2e-5, 1e-3) < bound
    abar = torch.randn(PROBES, *call.value.shape, dtype=dtype, device=device.NAME)
    pulled = {slot: vjp(lin, abar, slot) for slot in tangents}
    inner = sum((pulled[slot] * tangents[slot]).sum() for slot in tangents)  # ⟨Dᵀā, ẋ⟩ = ⟨ā, Dẋ⟩
    scale = float(abar.norm() * pushed.norm())
    assert abs(float(inner - (abar * pushed).sum())) <= tolerance * max(scale, 1.0)
    for slot, value in pulled.items():
        assert value.shape == tangents[slot].shape
        before, buffer = torch.ones_like(value), torch.ones_like(value)
        found = lin.pull(abar, None, ALL, [slot], {slot: buffer})[slot]
        if found is buffer:
            assert error(buffer - before, value, 1e-3) < tolerance
        else:
            assert torch.equal(buffer, before)
    together = lin.pull(abar, None, ALL, list(tangents), {})
    assert all(error(together[slot], value, 1e-3) < tolerance for slot, value in pulled.items())
    # one slot at a time is what a graph with other inputs constant does
    alone = sum(jvp(lin, {slot: tangent}) for slot, tangent in tangents.items())
    assert error(alone, pushed, 1e-3) < tolerance


@pytest.mark.parametrize("name, sample", [row for row in ROWS if row.values[1].autograd])
@pytest.mark.parametrize("share", [False, True], ids=["", "shared"])
def test_second_order(name: str, sample: Sample, share: bool) -> None:
    torch.manual_seed(1)
    call = make_call(name, sample)
    rule = RULES[name]
    lin, slots = rule.linearize(call), _slots(call)
    pairs = {pair for pair in rule.pairs(call.node) if set(pair) <= set(slots)}
    lam = torch.randn_like(call.value)
    bind(lin, lam, slots if share else ())
    full = {slot: torch.randn(PROBES, *call.shape(slot), dtype=torch.float64, device=device.NAME) for slot in slots}
    for given in [full, *({slot: full[slot]} for slot in slots)]:
        for k in range(PROBES):
            rest = {slot: torch.zeros_like(call.values[slot]) for slot in slots}
            pulled, terms = _autograd(call, lam, {**rest, **{slot: t[k] for slot, t in given.items()}})
            for slot in slots:
                assert error(vjp(lin, lam.unsqueeze(0), slot)[0], pulled[slot], 1e-3) < LOOSE.get(name, 1e-10)
                found = second(lin, given, slot)
                zero = torch.zeros_like(call.values[slot])
                assert error(zero if found is None else found[k], terms[slot], 1e-3) < 1e-9
                if not any((slot, other) in pairs for other in given):
                    assert found is None  # structure says so, and nobody computes it
        # a pull adds both terms, for all probes or for some rows of them
        for count, rows in ((1, slice(None)), (PROBES, slice(None)), (PROBES, slice(1, None))):
            near = {slot: t[: len(range(count)[rows])] for slot, t in given.items()}
            abar = torch.randn(count, *call.value.shape, dtype=torch.float64, device=device.NAME)
            joined = lin.pull(abar, lin.push(near, True, slots)[1], rows, slots, {})
            for slot in slots:
                expected, term = vjp(lin, abar, slot).clone(), second(lin, near, slot)
                if term is not None:
                    expected[rows] += term
                assert error(joined[slot], expected, 1e-3) < 1e-10
                place = joined[slot].untyped_storage().data_ptr()
                assert all(x.untyped_storage().data_ptr() != place for x in near.values())
    for i, j in pairs:
        assert (j, i) in pairs
        left, right = second(lin, {j: full[j]}, i), second(lin, {i: full[i]}, j)
        assert left is not None and right is not None
        assert abs(float((left[0] * full[i][0]).sum() - (right[0] * full[j][0]).sum())) < 1e-9


class NoLooking(TorchDispatchMode):
    """Refuses ops that bring values to the host: a recorded sweep could not replay them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero"), f"{name} looks at a value"
        masks = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dtype is torch.bool]
        assert not ("index" in name and masks), f"{name} looks a mask up"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, sample", ROWS)
def test_sweeps_look_at_no_values(name: str, sample: Sample) -> None:
    torch.manual_seed(4)
    call = make_call(name, sample)
    lin, slots = RULES[name].linearize(call), _slots(call)
    bind(lin, torch.randn_like(call.value), slots)
    tangents = {slot: torch.randn(PROBES, *call.shape(slot), dtype=torch.float64, device=device.NAME) for slot in slots}
    abar = torch.randn(PROBES, *call.value.shape, dtype=torch.float64, device=device.NAME)
    with NoLooking():
        residual = lin.push(tangents, True, slots)[1]
        lin.pull(abar, residual, ALL, slots, {})


SPECIAL = [
    pytest.param(name, sample, point, id=f"{name}-{point}")
    for name, found in SAMPLES.items()
    for sample in found
    for point in sample.special
]


@pytest.mark.parametrize("name, sample, point", SPECIAL)
def test_conventions_at_kinks_are_those_of_autograd(name: str, sample: Sample, point: float) -> None:
    torch.manual_seed(2)
    call = make_call(name, sample, special=point)
    lin, slots = RULES[name].linearize(call), _slots(call)
    lam = torch.randn_like(call.value)
    bind(lin, lam)
    tangents = {slot: torch.randn_like(call.values[slot]) for slot in slots}
    pulled, terms = _autograd(call, lam, tangents)
    for slot in slots:
        for order, expected in enumerate((pulled[slot], terms[slot])):
            found = vjp(lin, lam.unsqueeze(0), slot)
            if order:
                term = second(lin, {k: t.unsqueeze(0) for k, t in tangents.items()}, slot)
                found = torch.zeros_like(found) if term is None else term
            known = expected.isfinite()
            assert error(found[0][known], expected[known], 1e-3) < LOOSE_AT_KINKS.get(name, 1e-12)


@pytest.mark.parametrize("threshold", ["row_kernel", "rows"])
@pytest.mark.parametrize("name, sample", [row for row in ROWS if row.values[0] in rowwise.TABLE])
def test_large_rows_are_taken_by_kernels(
    name: str, sample: Sample, threshold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.CPU, threshold, 0)
    monkeypatch.setattr(machine.CPU, "program", 0)
    monkeypatch.setattr(machine.CPU, "norm", 0)
    test_products(name, sample, torch.float64)
    test_second_order(name, sample, False)


@pytest.mark.parametrize("name", ["aten._softmax.default", "aten._log_softmax.default"])
def test_a_softmax_of_one_number_is_constant(name: str) -> None:
    lin = RULES[name].linearize(make_call(name, Sample(lambda: (normal(), 0, False))))
    probes = torch.randn(3, dtype=torch.float64, device=device.NAME)
    lin.bind(probes[:1], [0], {})
    moved, residual = lin.push({0: probes}, True, [0])
    assert residual is None and moved is not None and moved.tolist() == [0.0] * 3
    assert lin.pull(probes, None, slice(None), [0], {})[0].tolist() == [0.0] * 3


def test_a_safe_softmax_is_zero_in_rows_of_minus_infinity() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, device=device.NAME)
    x[1], x[2, :2] = -torch.inf, -torch.inf
    name = "aten._safe_softmax.default"
    node = make_call(name, SAMPLES[name][0]).node
    for rows in (x, x[:1]):
        assert torch.equal(RULES[name].run(node, [rows], SYSTEM), torch.ops.aten._safe_softmax(rows, -1))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 2, 3, 2), (3,), (3, 4), (3, 1, 5)])
def test_sums_of_batch_norm_in_any_memory_layout(
    samples: int, kernel: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(batch_affine.sums, "_chosen", ())
    torch.manual_seed(3)
    name = "dag_hesse.batch_affine.default"
    sample = Sample(lambda: (normal(samples, *shape), normal(3), normal(3), normal(3), positive(3), 1e-3), fixed=(3, 4))
    call = make_call(name, sample)
    g = torch.randn_like(call.value)

    def scale_slope(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        lin = RULES[name].linearize(Call(call.node, (x, *call.values[1:]), call.value, call.active))
        return vjp(lin, g[None], 1)[0], vjp(lin, g[None], 2)[0]

    over = [0, *range(2, g.ndim)]
    spread = [1, 3, *(1,) * (g.ndim - 2)]
    mean, r = call.values[3].reshape(spread), (call.values[4] + 1e-3).rsqrt()
    turned, total = (g * (call.values[0] - mean)).sum(over) * r, g.sum(over)
    for x_laid in _layouts(call.values[0]):
        for g_laid in _layouts(g):
            found = scale_slope(x_laid, g_laid)
            assert error(found[0], turned) < 1e-12
            assert error(found[1], total) < 1e-12


def _layouts(x: Tensor) -> list[Tensor]:
    """The tensor in row order, with channels last, and with its axes in memory turned round."""
    order = list(reversed(range(x.ndim)))
    turned = x.permute(order).contiguous().permute(order)
    return [x, x.movedim(1, -1).contiguous().movedim(-1, 1), turned]
