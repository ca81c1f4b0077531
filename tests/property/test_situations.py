"""Every situation of the vocabulary by itself, in a model that is linear before and after it; and faults once found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dag_hesse as dh
from tests.oracle import Rounded, Truth, error
from tests.property.dags import ACROSS, ACROSS_TWO, WITHIN, Recipe, Step
from tests.property.test_random_dags import agree, check_blocks, check_products

LABELS = torch.tensor([0, 1, 2, 0])


def alone(op: str) -> Recipe:
    inputs = (2, 1) if op in ACROSS_TWO else (2,)
    steps = (Step("linear0", (0,)), Step("flip", (1,)), Step(op, inputs), Step("linear1", (3,)), Step("sin", (4,)))
    return Recipe(steps, "cross entropy", 3)


@pytest.mark.parametrize("op", WITHIN)
def test_a_step_alone(op: str) -> None:
    check_blocks(alone(op))


@pytest.mark.parametrize("op", [*ACROSS, *ACROSS_TWO])
def test_a_write_that_others_see_alone(op: str) -> None:
    check_products(alone(op))


class Moved(nn.Module):
    """Gives a parameter memory that it computed from the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data = self.layer.weight.data * x.mean()
        return self.layer(x).sin()


def test_memory_that_a_parameter_is_given_is_computed_anew_for_every_batch() -> None:
    model = Moved()
    batches = [(torch.randn(4, 3).double(), LABELS) for _ in range(2)]
    found = dh.HessianOperator(model, batches).dense()
    parts = []
    for x, y in batches:
        w = (model.layer.weight.detach() * x.mean()).requires_grad_()
        b = model.layer.bias.detach().clone().requires_grad_()
        given = torch.autograd.functional.hessian(
            lambda w, b, x=x, y=y: F.cross_entropy(F.linear(x, w, b).sin(), y), (w, b)
        )
        parts.append(
            torch.cat(
                [torch.cat([h.reshape(p.numel(), -1) for h in row], 1) for p, row in zip((w, b), given, strict=True)]
            )
        )
    assert error(found, sum(parts) / 2) < 1e-10


def test_complex_nodes_count_twice_in_rank_bounds() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 3)).double()
    model[1].forward = lambda x: torch.fft.irfft(torch.fft.rfft(x), n=3)  # type: ignore[method-assign]
    batch = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    graph = dh.capture(model, batch, points=["0", "1"])
    report = dh.analyze(model, batch, points=["0"], mode="exact")
    rank = int(torch.linalg.matrix_rank(report.block("0", "0", "gn"), rtol=1e-9))
    assert rank == 3
    assert (dh.structure(graph).shared_rank_bound >= rank).all()


class Beside(nn.Module):
    """A module that returns what it is given, and a way around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.same, self.last = nn.Linear(3, 3), nn.Dropout(0.5).eval(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.last(self.same(z).tanh() + z.sin())


def test_a_module_that_returns_its_input_is_a_point_beside_a_way_around_it() -> None:
    model, x = Beside().double(), torch.randn(4, 3).double()
    report = dh.analyze(model, (x, LABELS), points=["first", "same"], mode="exact")
    truth = Truth(model, lambda: F.cross_entropy(model(x), LABELS), ["first", "same"])
    for v in report.names:
        for w in report.names:
            assert error(report.block(v, w), truth.block(v, w, "full", "shared")) < 1e-10


@pytest.mark.parametrize("axis", [1, 0], ids=["elements", "rows"])
def test_a_value_written_by_a_mask_keeps_samples_apart(axis: int) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.same, self.last = nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.first(x).clone()
            z[(z if axis else z.sum(1)) > 0.3] = 0.1
            return self.last(self.same(z).tanh())

    model, x = Written().double(), torch.randn(4, 3).double()
    report = dh.analyze(model, (x, LABELS), points=["first", "same"], mode="exact", batch_mode="per_sample")
    assert [point.dim for point in report.points] == [4, 4]
    truth = Truth(model, lambda: F.cross_entropy(model(x), LABELS), ["first", "same"])
    assert error(report.block("first", "same"), truth.block("first", "same", "full", "per_sample", 4)) < 1e-10


def test_an_error_is_told_from_rounding() -> None:
    x = torch.randn(3, 3).double()
    p = torch.tensor(1 - 1e-9, dtype=torch.float64)

    def rounded(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def again() -> Tensor:
            with Rounded():
                return run()

        return again

    assert not agree(x @ x + 1e-7, x @ x, 1.0, rounded(lambda: x @ x))  # well conditioned: that is an error
    assert agree(1 - p + 1e-17, 1 - p, 0.0, rounded(lambda: 1 - p * 1))  # nobody has those digits
    assert not agree(1 - p + 1e-14, 1 - p, 0.0, rounded(lambda: 1 - p * 1))
