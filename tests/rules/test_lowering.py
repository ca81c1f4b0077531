"""Lowerings give the op's value and both of its derivatives, by the rules of what they call alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dag_hesse.rules import RULES
from dag_hesse.rules.lowering import CONCRETE, LOWERINGS, decompositions
from tests import device
from tests.oracle import error
from tests.rules.lowered import Written, by_differences, by_double_backward, gradient, of_op
from tests.rules.products import bind, second, vjp
from tests.rules.rows import NORMS, ROWS, Row
from tests.rules.samples import normal
from tests.rules.test_opaque import call_of

aten = torch.ops.aten


@pytest.mark.parametrize("op, forward, arguments", [pytest.param(*row, id=str(row[0])) for row in NORMS])
@pytest.mark.parametrize("output", [0, 1])
def test_backward_of_a_norm_is_differentiated_through_its_statistics(
    op: Any, forward: Callable[..., Tensor], arguments: Callable[..., tuple[Any, ...]], output: int
) -> None:
    torch.manual_seed(0)
    x, w, b, g = normal(3, 4), normal(4), normal(4), normal(3, 4)
    args = arguments(x, w, b, g)
    tensors = [a for a in args if isinstance(a, Tensor)]
    active = [next(k for k, a in enumerate(tensors) if a is wanted) for wanted in (g, x, w)]
    written = Written(op, args, active=active, output=output)

    def slope(given: Sequence[Tensor]) -> Tensor:
        """The forward's gradient in x or γ, on the tape."""
        leaf = [given[k] for k in active]
        with torch.enable_grad():
            y = forward(*leaf[1:], b)
            return torch.autograd.grad(y, leaf[1 + output], leaf[0], create_graph=True)[0]

    values = [v + 0 for v in tensors]
    for k in active:
        values[k].requires_grad_()
    assert error(written.value, slope(values).detach()) < 1e-12
    lam = torch.randn_like(written.value)
    first, second = written.derivatives(lam)
    assert error(first, gradient(slope, tensors, active, lam)) < 1e-10
    # autograd's third derivatives of layer_norm and batch_norm take the statistics for constants
    assert error(second, by_differences(slope, tensors, active, lam)) < 1e-7


def _values(row: Row) -> tuple[tuple[Any, ...], list[Tensor]]:
    args = row.make()
    return args, [x for x in [*args, *row.options.values()] if isinstance(x, Tensor)]


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.op}-{k}") for k, row in enumerate(ROWS)])
def test_value_and_derivatives(row: Row) -> None:
    torch.manual_seed(0)
    args, values = _values(row)
    logits = "ctc" in str(row.op)
    given = (torch.log_softmax(args[0], -1), *args[1:]) if logits else args
    written = Written(row.op, given, row.options, active=row.active, output=row.output)
    run = row.formula or of_op(row.op, args, row.options, row.output)
    assert error(written.value, run(values), 1e-3) < 1e-13
    lam = torch.randn_like(written.value)
    slope, hessian = written.derivatives(lam)
    if logits:
        slope, hessian = _through_log_softmax(values[0], slope[0] if slope.ndim > 1 else slope, hessian)
    assert error(slope, gradient(run, values, written.active, lam), 1e-3) < 1e-10
    assert error(hessian, hessian.mT, 1e-3) < 1e-12
    if "double" in row.truth and not logits:
        assert error(hessian, by_double_backward(run, values, written.active, lam), 1e-3) < 1e-9
    if "differences" in row.truth:
        assert error(hessian, by_differences(run, values, written.active, lam), 1e-3) < 1e-7


def _through_log_softmax(x: Tensor, slope: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives in logits from those in log-probabilities."""
    turn = torch.autograd.functional.jacobian(lambda x: torch.log_softmax(x, -1), x).reshape(x.numel(), x.numel())
    own = torch.autograd.functional.hessian(lambda x: (torch.log_softmax(x, -1).reshape(-1) * slope).sum(), x)
    return turn.T @ slope, turn.T @ hessian @ turn + own.reshape(x.numel(), x.numel())


# Compared elsewhere: under another name, by the backward passes of norms below, or as writes of the forward.
ELSEWHERE = {
    aten._ctc_loss.Tensor,
    aten.batch_norm_backward.default,
    aten.copy.default,
    aten.fill_diagonal_.default,
    *(row[0] for row in NORMS),
}


def test_every_lowering_has_a_row() -> None:
    from dag_hesse.rules import backward, distances, losses

    written, tested = {*LOWERINGS, *CONCRETE}, {row.op for row in ROWS} | ELSEWHERE
    assert not written - tested, "these lowerings have no Row in ROWS"
    assert tested <= {*written, *decompositions()}, "these rows are of ops that stay whole"
    assert {*losses.LOWERINGS, *distances.LOWERINGS, *backward.LOWERINGS} <= set(LOWERINGS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_binary_cross_entropy_where_the_probability_is_saturated(target: float, dtype: torch.dtype) -> None:
    p = torch.tensor([0.0, 1.0, 0.5], dtype=dtype)
    t = torch.full_like(p, target)
    written = Written(aten.binary_cross_entropy.default, (p, t, None, 0), active=(0,))
    slope, hessian = written.derivatives(torch.ones_like(p))
    run = of_op(aten.binary_cross_entropy.default, (p, t, None, 0))
    assert error(written.value, run([p, t])) < 1e-6
    assert error(slope, gradient(run, [p, t], [0], torch.ones_like(p))) < 1e-6
    assert bool(hessian.isfinite().all())  # so what σ' = 0 is multiplied with is a number
    truth = t / p**2 + (1 - t) / (1 - p) ** 2
    assert error(hessian.diagonal()[truth.isfinite()], truth[truth.isfinite()]) < 1e-6


ZEROS: list[tuple[Any, tuple[Any, ...], Tensor]] = [  # op, arguments, true Hessian of the sum
    (aten.huber_loss.default, (torch.zeros(2), torch.zeros(2), 2, 1.0), torch.eye(2)),
    (aten.smooth_l1_loss.default, (torch.zeros(2), torch.zeros(2), 2, 0.5), 2 * torch.eye(2)),
    (aten.std.correction, (torch.ones(3), [0]), torch.zeros(3, 3)),
    (aten.linalg_vector_norm.default, (torch.zeros(3), 2), torch.zeros(3, 3)),
    (aten.linalg_vector_norm.default, (torch.zeros(3), 3), torch.zeros(3, 3)),
    (aten._cdist_forward.default, (torch.ones(2, 3), torch.ones(1, 3), 2.0, None), torch.zeros(6, 6)),
    (aten._pdist_forward.default, (torch.ones(2, 3), 2.0), torch.zeros(6, 6)),
    (aten.softplus_backward.default, (torch.ones(1), torch.full((1,), 800.0), 1.0, 20.0), torch.zeros(2, 2)),
    (aten.soft_margin_loss.default, (torch.full((1,), 800.0), -torch.ones(1), 2), torch.zeros(1, 1)),
]


@pytest.mark.parametrize("op, args, truth", [pytest.param(*row, id=f"{row[0]}-{k}") for k, row in enumerate(ZEROS)])
def test_second_derivatives_at_special_points(op: Any, args: tuple[Any, ...], truth: Tensor) -> None:
    wide = tuple(x.double() if isinstance(x, Tensor) else x for x in args)
    written = Written(op, wide, active=None if len(truth) > 3 or "backward" in str(op) else (0,))
    slope, hessian = written.derivatives(torch.ones_like(written.value))
    size = len(truth)
    assert bool(slope.isfinite().all())
    assert error(hessian[:size, :size], truth, 1.0) < 1e-12


@pytest.mark.parametrize("fill", ["zeros", "eye", "rank one", "repeated"])
def test_determinants_at_singular_matrices_and_equal_singular_values(fill: str) -> None:
    torch.manual_seed(0)
    a = (
        {
            "zeros": torch.zeros(2, 2),
            "eye": torch.eye(3),
            "rank one": torch.outer(torch.arange(1.0, 4.0), torch.ones(3)),
            "repeated": torch.diag(torch.tensor([2.0, 2.0, 0.0])),
        }[fill]
        .double()
        .to(device.NAME)
    )
    n = a.numel()
    call = call_of(aten._linalg_det.default, a, output=0)
    lin = RULES["aten._linalg_det.default"].linearize(call)
    lam = torch.tensor(0.7, dtype=torch.float64, device=device.NAME)
    bind(lin, lam)
    every = torch.eye(n, dtype=torch.float64, device=device.NAME).reshape(n, *a.shape)
    term = second(lin, {0: every}, 0)
    assert term is not None

    def cofactors(x: Tensor) -> Tensor:
        """The gradient of a determinant, from minors."""
        size = len(x)
        rows = [[k for k in range(size) if k != i] for i in range(size)]
        return torch.stack(
            [
                torch.stack([(-1) ** (i + j) * torch.linalg.det(x[rows[i]][:, rows[j]]) for j in range(size)])
                for i in range(size)
            ]
        )

    assert error(vjp(lin, lam.reshape(1), 0)[0], 0.7 * cofactors(a), 1.0) < 1e-12
    for k in range(n):
        ends = [cofactors(a + sign * 1e-4 * every[k]) for sign in (1, -1)]
        assert error(term[k], 0.7 * (ends[0] - ends[1]) / 2e-4, 1e-3) < 1e-8


def test_the_diagonal_is_filled() -> None:
    for shape, wrap in (((3, 4), False), ((7, 2), True), ((7, 2), False), ((2, 2, 2), False)):
        x = normal(*shape)
        written = Written(aten.fill_diagonal_.default, (x, 1.5, wrap))
        assert torch.equal(written.value, x.clone().fill_diagonal_(1.5, wrap))
        kept = (x.clone().fill_diagonal_(torch.nan, wrap)).isfinite().double()
        slope, hessian = written.derivatives(torch.ones_like(x))
        assert torch.equal(slope, kept.reshape(-1))
        assert not bool(hessian.any())


def test_packed_sequences_know_their_sizes() -> None:
    written = Written(aten._pack_padded_sequence.default, (normal(3, 2, 2), torch.tensor([3, 1]), False), output=1)
    assert written.value.tolist() == [2, 1, 1]
