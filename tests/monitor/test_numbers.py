"""Every number that a monitor gives, against dense double-backward in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.monitor import optimizers
from dag_hesse.monitor.quantities import Moment, logged
from dag_hesse.operators.base import SymmetricOperator
from dag_hesse.operators.vectors import VectorForm
from tests.monitor.common import Net, data, flat, matrix, net, top, train_step, truth

NAMES = [name for name, _ in net().named_parameters()]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
}
EDGES = {"sgd": 2.0, "momentum": 3.8 / 0.5, "nesterov": 3.6 / 2.6, "adam": 18.0, "adamw": 38.0, "amsgrad": 38.0}


def run(model: nn.Module, optimizer: Any, monitor: dh.Monitor, steps: int) -> tuple[dict[str, float], torch.Tensor]:
    """Measurements at the last step, and the last update of all parameters."""
    metrics = None
    for step in range(1, steps + 1):
        before = flat(model.parameters())
        train_step(model, optimizer, data())
        metrics = monitor.step(step)
    assert metrics is not None and metrics["curvature/failed"] == 0, monitor.failures
    return {name.removeprefix("curvature/"): x for name, x in metrics.items()}, flat(model.parameters()) - before


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_numbers_are_those_of_dense_curvature(kind: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    monitor = dh.Monitor(model, data(9), every=4, optimizer=optimizer, points=["stem", "body"], mode="exact")
    found, d = run(model, optimizer, monitor, 8)
    expected = truth(model, data(9), points=["stem", "body"])
    h, gn = matrix(expected, NAMES), matrix(expected, NAMES, "gn")
    assert math.isclose(found["update_norm"], float(d.norm()), rel_tol=1e-12)
    assert math.isclose(found["update_gn"], float(d @ gn @ d / (d @ d)), rel_tol=1e-9)
    assert math.isclose(found["update_tensor"], float(d @ (h - gn) @ d / (d @ d)), rel_tol=1e-8)
    assert math.isclose(found["update"], float(d @ h @ d / (d @ d)), rel_tol=1e-9)
    assert math.isclose(found["sharpness"], top(h), rel_tol=1e-5)
    scaled, rate = found["sharpness"], optimizer.param_groups[0]["lr"] / EDGES[kind]
    if "adam" in kind or kind == "amsgrad":
        # What Adam has just done says what its preconditioner is: its step is -lr P⁻¹ m.
        m = flat(optimizer.state[p]["exp_avg"] for p in model.parameters())
        moved = d.abs() > 1e-6 * d.abs().max()
        p = torch.where(moved, -optimizer.param_groups[0]["lr"] * m / d, torch.inf)
        own = flat(optimizers.preconditioner(optimizer, list(model.parameters())))
        assert torch.allclose(own[moved], p[moved], rtol=1e-6)
        scaled = top(h / (own.sqrt()[:, None] * own.sqrt()))
        assert math.isclose(found["preconditioned_sharpness"], scaled, rel_tol=1e-5)
    else:
        assert "preconditioned_sharpness" not in found
    assert math.isclose(found["stability"], rate * scaled, rel_tol=1e-5)
    for name in ("stem", "body"):
        full, gauss, tensor = (expected.block(name, name, part, "shared") for part in ("full", "gn", "tensor"))
        assert math.isclose(found[f"resonance/{name}"], float(full.norm()), rel_tol=1e-9)
        assert math.isclose(found[f"gn_gap/{name}"], float(tensor.norm() / gauss.norm()), rel_tol=1e-6, abs_tol=1e-14)
    eval_loss = nn.functional.cross_entropy(_evaluated(model)(data(9)[0]), data(9)[1])
    assert math.isclose(found["loss"], eval_loss.item(), rel_tol=1e-12)
    assert monitor.report is not None and monitor.report.names == ("stem", "body")


def _evaluated(model: nn.Module) -> nn.Module:
    other = Net()
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_edge_is_where_the_real_optimizer_leaves_a_quadratic(kind: str) -> None:
    """Beyond stability 1 its steps grow, below they shrink."""
    for stability in (0.97, 1.03):
        weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = OPTIMIZERS[kind]([weight])
        group = optimizer.param_groups[0]
        scale = 1.0
        if "betas" in group:  # second moments that stay what they are, however small gradients are beside them
            group["betas"], scale = (group["betas"][0], 1 - 1e-15), 3.0
            optimizer.state[weight] = {
                "step": torch.tensor(1e20, dtype=torch.float64),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.full_like(weight, scale**2),
                "max_exp_avg_sq": torch.full_like(weight, scale**2),
            }
            (p,) = optimizers.preconditioner(optimizer, [weight])
            assert math.isclose(float(p), scale, rel_tol=1e-6)
        (rate,) = optimizers.rates(optimizer, [weight])
        curvature = stability / rate * scale
        with torch.no_grad():
            weight.mul_(1e-9)
        peak = 0.0
        for _ in range(600):
            weight.grad = curvature * weight.detach()
            optimizer.step()
            peak = max(peak, abs(weight.item()))
        assert (peak > 1e-6) == (stability > 1), (stability, peak)


def test_groups_with_rates_of_their_own() -> None:
    for make, edge in ((torch.optim.SGD, 2.0), (torch.optim.AdamW, 38.0)):
        model = net()
        groups = [{"params": model.stem.parameters(), "lr": 0.3}, {"params": model.head.parameters(), "lr": 0.05}]
        optimizer = make(groups)
        monitor = dh.Monitor(model, data(9), every=1, optimizer=optimizer, quantities=["sharpness", "stability"])
        found, _ = run(model, optimizer, monitor, 3)
        names = [n for n in NAMES if not n.startswith("body")]
        h = matrix(truth(model, data(9), names), names)
        assert math.isclose(found["sharpness"], top(h), rel_tol=1e-5)  # of what the optimizer holds alone
        own = [dict(model.named_parameters())[n] for n in names]
        eta = flat(torch.full_like(p, 0.3 if n.startswith("stem") else 0.05) for n, p in zip(names, own, strict=True))
        scale = optimizers.preconditioner(optimizer, own)
        d = (eta / edge / (torch.ones_like(eta) if scale is None else flat(scale))).sqrt()
        assert math.isclose(found["stability"], top(d[:, None] * h * d), rel_tol=1e-5)


def test_in_training_mode_batches_are_coupled() -> None:
    model = net()
    model.body[0].p = 0.0
    monitor = dh.Monitor(model, data(9), quantities=["sharpness"], training=True)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    found = monitor.step(0)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(
        nn.functional.cross_entropy(model(data(9)[0]), data(9)[1]), parameters, create_graph=True
    )
    rows = [flat(torch.autograd.grad(x, parameters, retain_graph=True)) for x in flat_graph(gradient)]
    assert math.isclose(found["curvature/sharpness"], top(torch.stack(rows)), rel_tol=1e-5)


def flat_graph(gradient: Any) -> torch.Tensor:
    return torch.cat([g.reshape(-1) for g in gradient])


def test_a_piecewise_linear_network_has_no_tensor_part() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    monitor = dh.Monitor(model, data(dtype=torch.float32), every=1, points=["1", "3"])
    found = monitor.step(0)
    assert found["curvature/gn_gap/1"] == found["curvature/gn_gap/3"] == 0.0


class Diagonal(SymmetricOperator):
    """A diagonal matrix, which counts its products."""

    def __init__(self, values: torch.Tensor) -> None:
        self.form = VectorForm(("x",), ((len(values),),), values.dtype, values.device)
        self.values, self.count = values, 0

    @property
    def chunk(self) -> int:
        return 1

    def _products(self, segments: list[torch.Tensor]) -> list[torch.Tensor]:
        self.count += 1
        return [segments[0] * self.values]


@pytest.mark.parametrize("ratio", [1.02, 1.1, 1.5, 3.0])
def test_a_start_from_what_is_not_the_largest_any_more_is_left(ratio: float) -> None:
    """As training goes on another eigenvalue overtakes the one whose eigenvector is known."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        bulk = 0.02 * torch.randn(4990, generator=generator, dtype=torch.float64)
        operator = Diagonal(torch.cat([torch.tensor([ratio]), 1 / torch.arange(1.0, 10.0), bulk]))
        known = 1e-5 * torch.randn(5000, generator=generator, dtype=torch.float64)
        known[:2] = torch.tensor([0.0, 1.0])
        moment = Moment(SimpleNamespace(parameters={}), None, {"sharpness": known}, (0, seed))
        assert math.isclose(moment.largest("sharpness", operator), ratio, rel_tol=1e-4)
        assert operator.count <= 20


def test_a_warm_start_takes_fewer_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3))
    monitor = dh.Monitor(model, data(64, torch.float32), every=1, quantities=["sharpness"])
    operator, taken = monitor._subject.operator, []
    for step in range(4):
        before = operator._problem.sweeps
        monitor.step(step)
        taken.append(operator._problem.sweeps - before)
    assert max(taken[1:]) <= 9 < taken[0] and monitor._subject.operator is operator


def test_names_are_what_loggers_take() -> None:
    assert logged(["a.b", "c[0]", "c[1]", ""]) == ["a.b", "c_0", "c_1", "model"]
    assert logged(["c[0]", "c_0"]) == ["c[0]", "c_0"]
