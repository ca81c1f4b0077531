"""What cannot be captured is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from torch import Tensor, nn
from torch import distributions as td
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.map import map as mapped
from torch.nn.attention.flex_attention import flex_attention

import dag_hesse as dh
from dag_hesse import errors
from dag_hesse._capture.refused import in_place_of
from dag_hesse._capture.writes import drawn, drawn_with_slope
from dag_hesse.sweep import kept, proof
from tests import device
from tests.capture.common import Around, X, Y, module_in_a_list
from tests.property.steps.parts import Cube


class Once(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * ctx.factor * g * x**2, None


def _hooked(m: Any, z: Tensor) -> Tensor:
    z = z * 1.0
    z.register_hook(lambda g: 2 * g)
    return z


def test_a_hook_that_changes_gradients_is_found_out() -> None:
    with pytest.raises(errors.UnfaithfulCaptureError, match=r"gradient differs from autograd's at 'a\.weight'"):
        dh.HessianOperator(Around(_hooked), (X, Y))
    assert dh.HessianOperator(Around(_hooked), (X, Y), verify="none").shape == (31, 31)


def _overwritten(m: Any, z: Tensor) -> Tensor:
    z.add_(torch.kron(z, z.mean(0)[None])[:, :: z.shape[1]], alpha=0.5)
    return z


def test_central_differences_are_asked_where_graph_and_autograd_differ() -> None:
    # PyTorch's kron remembers operands without a look at later writes, so the gradient that autograd gives is wrong.
    model = Around(_overwritten)
    with pytest.raises(errors.UnfaithfulCaptureError, match="central differences of its loss confirm the graph's"):
        dh.HessianOperator(model, (X, Y))
    operator = dh.HessianOperator(model, (X, Y), verify="none")
    gradient, along = operator.gradient, torch.randn(31, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        start = torch.nn.utils.parameters_to_vector(model.parameters())
        losses = []
        for step in (1e-5, -1e-5):
            torch.nn.utils.vector_to_parameters(start + step * along, model.parameters())
            losses.append(float(nn.functional.cross_entropy(model(X), Y)))
        torch.nn.utils.vector_to_parameters(start, model.parameters())
    assert abs(float(gradient @ along) - (losses[0] - losses[1]) / 2e-5) < 1e-8


def test_a_graph_that_is_captured_anew_is_compared_with_the_model_too() -> None:
    model = Around(lambda m, z: z.tanh() if float(z.detach().sum()) > 0 else _hooked(m, z))
    nn.init.zeros_(model.a.bias)
    forward = X if float(model.a(X).sum()) > 0 else -X
    batches = [(forward, Y), (-3 * forward, Y)]
    operator = dh.HessianOperator(model, batches)
    with (
        pytest.warns(UserWarning, match="captured anew"),
        pytest.raises(errors.UnfaithfulCaptureError, match="gradient"),
    ):
        operator @ torch.ones(operator.shape[1]).double()


def test_a_graph_that_fails_on_a_batch_is_told_of_and_its_successor_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, proved = dh.HessianOperator(Around(lambda m, z: z.tanh()), (X, Y)), list[object]()
    expected, original, left = operator.dense(), kept.Linearization, ["it fails"]

    class Failing(original):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            if left:
                raise errors.CaptureError(left.pop())
            super().__init__(*args, **options)

    monkeypatch.setattr(kept, "Linearization", Failing)
    monkeypatch.setattr(proof, "prove", lambda *args, **options: proved.append(args))
    operator.refresh()
    with pytest.warns(UserWarning, match="captured anew.*it fails"):
        found = operator.dense()
    assert torch.equal(found, expected) and len(proved) == 1


def test_a_function_that_cannot_be_differentiated_twice_is_named() -> None:
    with pytest.raises(errors.NonDifferentiableError, match=r"function\.Once.*common\.py:\d+"):
        dh.HessianOperator(Around(module_in_a_list, fn=Once.apply), (X, Y))


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
    with pytest.raises(errors.CaptureError, match=r"computed before, with a gradient.*test_refusals\.py:\d+"):
        dh.HessianOperator(Around(lambda m, z: z * outside), (X, Y))


def _looped(m: Any, z: Tensor) -> Tensor:
    start = torch.zeros((), dtype=torch.long, device=z.device)
    return while_loop(lambda i, a: i < 2, lambda i, a: (i + 1, a.sin()), (start, z))[1]


def _attended(m: Any, z: Tensor) -> Tensor:
    with torch.no_grad():  # on the CPU it has no backward
        return flex_attention(*(z.detach()[None, None].float(),) * 3)[0, 0] + z  # type: ignore[operator, return-value]


@pytest.mark.parametrize(
    ("fn", "name", "instead"),
    [
        (lambda m, z: torch.cond(z.sum() > 0, torch.sin, torch.cos, (z,)), r"torch\.cond", "a Python 'if'"),
        (_looped, "while_loop", "a Python 'while'"),
        (lambda m, z: mapped(torch.sin, z), "map", "torch.vmap"),
        (lambda m, z: scan(lambda a, b: (a + b, a * b), z[0], z)[1], "scan", "a Python loop"),
        (_attended, "flex_attention", "scaled_dot_product_attention"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # flex_attention's, of not being compiled
def test_ops_of_functions_are_refused_by_name(fn: Any, name: str, instead: str) -> None:
    with pytest.raises(errors.CaptureError, match=rf"^{name} at .*test_refusals\.py:\d+ .*: write .*{instead}"):
        dh.HessianOperator(Around(fn), (X, Y))


def test_an_op_of_functions_that_is_not_known_is_refused_by_its_own_name() -> None:
    assert in_place_of("hints_wrapper", "a.py:3").startswith("hints_wrapper at a.py:3 takes functions")


def _jagged(m: Any, z: Tensor) -> Tensor:
    return torch.cat(list(torch.nested.as_nested_tensor([z[:1], z[1:]], layout=torch.jagged).unbind()))


@pytest.mark.parametrize(
    ("fn", "does"),
    [
        (_jagged, r"a nested tensor \(torch\.jagged\).*padded"),
        (lambda m, z: torch.cat(list(torch.nested.as_nested_tensor([z[:1], z[1:]]).unbind())), "gives a nested tensor"),
        (
            lambda m, z: torch.sparse.mm(torch.eye(4, device=device.NAME).double().to_sparse(), z),
            r"gives a sparse tensor of .*_coo",
        ),
        (
            lambda m, z: torch.eye(4, device=device.NAME).double().to_sparse_csr() @ z,
            r"gives a sparse tensor of .*_csr.*dense",
        ),
        (lambda m, z: torch.sparse.mm(_OUTSIDE, z), r"takes a sparse tensor of .*_coo"),
        (lambda m, z: z.to_sparse().to_dense(), r"gives a sparse tensor of .*_coo"),
    ],
)
def test_tensors_that_are_not_dense_are_refused_by_name(fn: Any, does: str) -> None:
    with pytest.raises(errors.CaptureError, match=rf"^aten\.\w+.* at .*test_refusals\.py:\d+ .*{does}"):
        dh.HessianOperator(Around(fn), (X, Y))


_OUTSIDE = torch.eye(4, device=device.NAME).double().to_sparse()


GAMMAS = {
    "gamma": lambda a: td.Gamma(a, torch.ones_like(a)).rsample(),
    "chi2": lambda a: td.Chi2(a).rsample(),
    "beside a path": lambda a: td.StudentT(a).rsample() + a,
    "own generator": lambda a: torch._standard_gamma(a, generator=torch.Generator().manual_seed(0)) + a,
    "dirichlet": lambda a: torch._sample_dirichlet(a) + a,
}


@pytest.mark.parametrize("verify", ["gradient", "none"])
@pytest.mark.parametrize("name", GAMMAS)
def test_draws_with_a_gradient_but_no_second_derivative_are_refused(name: str, verify: str) -> None:
    model = Around(lambda m, z: GAMMAS[name](nn.functional.softplus(z) + 3))
    with pytest.raises(
        errors.NonDifferentiableError, match=r"(gamma|dirichlet)\.default at .*test_refusals\.py:\d+ draws"
    ):
        dh.HessianOperator(model, (X, Y), verify=verify)
    with pytest.raises(errors.NonDifferentiableError, match=r"by \.sample\(\) or from detached"):
        dh.structure(model, (X, Y))


def _without_gradient(m: Any, z: Tensor) -> Tensor:
    a = nn.functional.softplus(z) + 3
    held = td.Gamma(a.detach(), torch.ones_like(a)).rsample()
    with torch.no_grad():
        held = held + torch._standard_gamma(a)
    return z * (held + td.Beta(a, a).sample())


def test_draws_without_a_gradient_are_numbers() -> None:
    model = Around(_without_gradient)
    state = torch.get_rng_state()
    operator = dh.HessianOperator(model, (X, Y))
    torch.set_rng_state(state)
    own = torch.autograd.grad(nn.functional.cross_entropy(model(X), Y), list(model.parameters()))
    torch.testing.assert_close(operator.gradient, torch.cat([g.reshape(-1) for g in own]), rtol=1e-12, atol=1e-14)


def _formulas() -> dict[str, str]:
    """What PyTorch's derivatives.yaml says of every op."""
    path = Path(torchgen.__file__).parent / "packaged/autograd/derivatives.yaml"
    pieces = re.split(r"^- name: ", path.read_text(), flags=re.MULTILINE)[1:]
    return {piece.split("(", 1)[0].removesuffix(".default"): piece.split("\n", 1)[1] for piece in pieces}


def test_what_random_ops_have_a_gradient_is_what_pytorch_says() -> None:
    formulas, seen = _formulas(), set()
    flat = re.compile(r"^(result\d?:.*|output_differentiability: \[False\]|\w+: (at::)?zeros.*)?$")
    for name in torch._C._dispatch_get_all_op_names():
        namespace, rest = name.split("::", 1)
        packet, _, overload = rest.partition(".")
        if namespace != "aten" or rest not in formulas:
            continue
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if drawn(op):
            lines = [line.split("#")[0].strip() for line in formulas[rest].splitlines()]
            seen.add((rest, drawn_with_slope(op)))
            assert drawn_with_slope(op) == (not all(map(flat.match, lines))), rest
    assert {("_standard_gamma", True), ("poisson", False), ("normal.Tensor_float", False)} <= seen
