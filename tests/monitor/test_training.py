"""Training goes on as without a monitor: bit for bit, through everything that goes wrong, however it is wrapped."""

from __future__ import annotations

import copy
import io
import logging
import math
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

import dag_hesse as dh
from dag_hesse import errors
from dag_hesse.monitor.monitor import Monitor
from dag_hesse.monitor.plots import PANELS
from dag_hesse.monitor.quantities import QUANTITIES
from dag_hesse.randomness import RandomState
from dag_hesse.sweep import Problem
from tests.monitor.common import Net, data, matrix, net, state_of, top, train_step, truth

F32 = torch.float32


def trained(every: int, make: Any, dtype: torch.dtype, **options: Any) -> tuple[list[torch.Tensor], Monitor | None]:
    """The state after 9 steps with a monitor, or without one where ``every`` is 0."""
    model, batch = net(dtype), data(dtype=dtype)
    torch.manual_seed(3)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    monitor = dh.Monitor(model, data(9, dtype), every, optimizer=optimizer, **options) if every else None
    for step in range(9):
        train_step(model, optimizer, batch)
        schedule.step()
        if monitor is not None:
            monitor.step(step)
    assert all(module.training for module in model.modules())
    return state_of(model, optimizer), monitor


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, F32])
@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.01)],
    ids=["sgd", "adamw"],
)
def test_training_is_bit_for_bit_the_same(make: Any, dtype: torch.dtype, training: bool) -> None:
    alone, _ = trained(0, make, dtype)
    watched, monitor = trained(2, make, dtype, training=training)
    assert monitor is not None and not monitor.failures and len(monitor.history["curvature/loss"]) == 5
    assert len(alone) == len(watched) and all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))


def test_random_numbers_of_a_measurement_are_not_training_s(monkeypatch: Any) -> None:
    def draws(moment: Any) -> dict[str, float]:
        return {"loss": torch.rand(()).item() + np.random.rand() + random.random()}

    monkeypatch.setitem(QUANTITIES, "loss", draws)
    monitor = dh.Monitor(net(), data(), quantities=["loss"])
    before = RandomState.now()
    assert monitor.step(0)["curvature/failed"] == 0
    after = RandomState.now()
    assert torch.equal(before.torch, after.torch) and not before.drew_outside(after)


def test_parameters_are_copied_once_a_step() -> None:
    model, count = net(), 0
    monitor = dh.Monitor(model, data(), every=4, quantities=["update"])
    copied = monitor._subject.copy

    def copy_counted() -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        return copied()

    with mock.patch.object(monitor._subject, "copy", copy_counted):
        for step in (0, 1, 2, 3, 3, 3, 4, 5):  # several batches a step
            monitor.step(step)
    assert count == 1


def test_flags_of_modules_stay_each_what_it_is() -> None:
    model = net()
    model.stem[1].eval()  # a frozen BatchNorm
    flags = [module.training for module in model.modules()]
    monitor = dh.Monitor(model, data())
    monitor.step(0)
    assert [module.training for module in model.modules()] == flags


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log() -> Iterator[list[str]]:
    records, logger = Records(), logging.getLogger("dag_hesse")
    logger.addHandler(records)
    yield records.lines
    logger.removeHandler(records)


def test_a_nan_step_is_logged_and_training_goes_on(log: list[str]) -> None:
    model = net()
    monitor = dh.Monitor(model, data(), every=1)
    whole = monitor.step(0)
    weight = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    found = monitor.step(1)
    assert found == {"curvature/abrupt": 0.0, "curvature/failed": 1.0}
    assert monitor.failures[0].step == 1 and "NonFiniteError: parameter 'head.weight'" in monitor.failures[0].reason
    assert any("training goes on" in line for line in log)
    with torch.no_grad():
        model.head.weight.copy_(weight)
    again = monitor.step(2)
    assert math.isclose(again["curvature/sharpness"], whole["curvature/sharpness"], rel_tol=1e-6)
    assert again["curvature/failed"] == 0


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError(), ValueError("odd"), AssertionError()]
)
def test_what_goes_wrong_in_one_quantity_leaves_the_others(error: Exception, monkeypatch: Any, log: list[str]) -> None:
    model = net()
    monitor = dh.Monitor(model, data(), every=1)
    whole = monitor.step(0)

    def fails(self: Problem, *args: Any, **options: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("dag_hesse.operators.eigen.eigsh", fails)
        found = monitor.step(1)
    missing = {"curvature/sharpness"}
    assert set(whole) - set(found) == missing and found["curvature/failed"] == len(missing)
    assert found["curvature/resonance/body"] == whole["curvature/resonance/body"]
    assert [f.quantity for f in monitor.failures] == ["sharpness"] and type(error).__name__ in monitor.failures[
        0
    ].reason
    with monkeypatch.context() as patch:
        patch.setattr(Problem, "run", fails)
        assert monitor.step(2)["curvature/failed"] == 2  # the loss takes no sweep; there is no update
    assert set(monitor.step(3)) == set(whole)
    assert len(log) == 3


def test_parameters_that_cannot_be_noted(log: list[str]) -> None:
    model = net()
    monitor = dh.Monitor(model, data(), every=2, quantities=["loss", "update"])
    monitor.step(0)
    model.requires_grad_(False)
    assert monitor.step(1) is None
    assert [f.quantity for f in monitor.failures] == ["update"]
    assert monitor.step(2) == {"curvature/abrupt": 0.0, "curvature/failed": 1.0}
    assert [f.quantity for f in monitor.failures] == ["update", "all"] and len(log) == 2
    with mock.patch.object(monitor._subject, "copy", side_effect=MemoryError):
        model.requires_grad_(True)
        assert monitor.step(3) is None
    found = monitor.step(4)
    assert found == {"curvature/loss": found["curvature/loss"], "curvature/abrupt": 0.0, "curvature/failed": 0.0}


def test_an_interrupt_is_raised(monkeypatch: Any) -> None:
    monitor = dh.Monitor(net(), data())
    monkeypatch.setattr(Problem, "run", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        monitor.step(0)
    assert all(module.training for module in monitor._subject.model.modules())


def test_memory_is_given_back_between_measurements() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1500), nn.Tanh(), nn.Linear(1500, 1500), nn.Tanh(), nn.Linear(1500, 3))
    monitor = dh.Monitor(model, data(600, F32), points=["1", "3"], probes=2)
    problems, sizes = (monitor._subject.operator._problem, monitor._subject.mapper.problem), []
    run = Problem.run

    def seen(self: Problem, *args: Any, **options: Any) -> Any:
        found = run(self, *args, **options)
        sizes.append(self.arena.size)
        return found

    with mock.patch.object(Problem, "run", seen):
        assert monitor.step(0)["curvature/failed"] == 0
    assert max(sizes) > 0
    for problem in problems:
        assert not problem._kept._kept and problem.arena.size == 0


def sharpness(monitor: Monitor, step: int) -> float:
    found = monitor.step(step)
    assert found is not None and not found["curvature/failed"], monitor.failures
    return found["curvature/sharpness"]


def expected(model: nn.Module, names: list[str] | None = None) -> float:
    names = [n for n, p in model.named_parameters() if p.requires_grad] if names is None else names
    return top(matrix(truth(model, data(), names), names))


def test_parameters_that_are_frozen_thawed_or_replaced() -> None:
    model = net()
    model.stem.requires_grad_(False)
    monitor = dh.Monitor(model, data(), every=1, quantities=["sharpness", "update"])
    operator = monitor._subject.operator
    assert math.isclose(sharpness(monitor, 0), expected(model), rel_tol=1e-5)
    model.stem.requires_grad_(True)
    assert math.isclose(sharpness(monitor, 1), expected(model), rel_tol=1e-5)
    assert monitor._subject.operator is not operator
    operator = monitor._subject.operator
    model.head.weight = nn.Parameter(2 * model.head.weight.detach())
    assert math.isclose(sharpness(monitor, 2), expected(model), rel_tol=1e-5)
    assert monitor._subject.operator is operator  # refreshed in place
    model.body[1] = nn.Linear(5, 7).double()
    model.head = nn.Linear(7, 3).double()
    assert math.isclose(sharpness(monitor, 3), expected(model), rel_tol=1e-5)
    assert (
        set(dict(monitor.history)["curvature/update_norm"][-1]) and monitor.history["curvature/update_norm"][-1][0] == 2
    )


def test_a_group_is_added_to_the_optimizer() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.1)
    monitor = dh.Monitor(model, data(), every=1, optimizer=optimizer, quantities=["sharpness", "stability", "update"])
    train_step(model, optimizer, data())
    assert math.isclose(sharpness(monitor, 0), expected(model, ["head.weight", "head.bias"]), rel_tol=1e-5)
    optimizer.add_param_group({"params": list(model.stem.parameters())})
    found = monitor.step(1)
    assert "curvature/stability" not in found and not found["curvature/failed"]  # there are no moments of these yet
    train_step(model, optimizer, data())
    assert "curvature/stability" in monitor.step(2)
    names = [n for n, _ in model.named_parameters() if not n.startswith("body")]
    assert math.isclose(monitor.history["curvature/sharpness"][-1][1], expected(model, names), rel_tol=1e-5)


def test_optimizer_states_are_looked_at_not_made() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    monitor = dh.Monitor(model, data(), every=1, optimizer=optimizer)
    found = monitor.step(0)
    assert not optimizer.state and "curvature/stability" not in found and "curvature/sharpness" in found


def test_gradients_may_be_off_and_types_automatic() -> None:
    model = net(F32)
    monitor = dh.Monitor(model, data(dtype=F32), every=1, quantities=["loss", "update", "sharpness"])
    first = sharpness(monitor, 0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert math.isclose(sharpness(monitor, 1), first, rel_tol=1e-6)
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    with torch.inference_mode():
        assert monitor.step(3)
        model.head.bias.data.add_(1e-6)
        assert "curvature/update" in monitor.step(4)
        inside = dh.Monitor(model, data(dtype=F32), quantities=["sharpness"])
        assert math.isclose(sharpness(inside, 0), first, rel_tol=1e-4)
        assert math.isclose(sharpness(monitor, 5), first, rel_tol=1e-4)


class Halves(Net):
    """Its forward is in bfloat16, as under automatic mixed precision of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


def test_a_forward_that_is_in_bfloat16_by_itself() -> None:
    torch.manual_seed(0)
    model, whole = Halves(F32), net(F32)
    monitor, other = (dh.Monitor(m, data(dtype=F32), quantities=["sharpness"]) for m in (model, whole))
    assert sharpness(monitor, 0) == sharpness(other, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.head(torch.ones(1, 4)).dtype is torch.bfloat16
    assert model.head(torch.ones(1, 4)).dtype is F32


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", ["compile", "compile in place", "ddp", "both"])
def test_wrapped_models(wrap: str, alone: None) -> None:
    model = net()
    plain, inside = copy.deepcopy(model), model
    if "compile" in wrap or wrap == "both":
        torch._dynamo.reset()
        model = torch.compile(model, backend="eager") if "place" not in wrap else model
        if "place" in wrap:
            model.compile(backend="eager")
    if wrap in ("ddp", "both"):
        model = nn.parallel.DistributedDataParallel(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    monitor = dh.Monitor(model, data(), every=2, optimizer=optimizer, points=["stem", "body"])
    for step in range(4):
        for m, o in ((model, optimizer), (plain, other)):
            torch.manual_seed(step)
            train_step(m, o, data())
        monitor.step(step)
    assert not monitor.failures and monitor._subject.model is inside
    for a, b in zip(inside.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert math.isclose(sharpness(monitor, 6), expected(plain), rel_tol=1e-5)


def test_shards_are_refused(alone: None) -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(distribute_tensor(model.weight, init_device_mesh("cpu", (1,)), [Replicate()]))
    assert isinstance(model.weight, DTensor)
    with pytest.raises(errors.OptionError, match="'weight' is a shard"):
        dh.Monitor(model, data())


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped() -> None:
    def parts() -> tuple[Any, Any, Monitor]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        return model, optimizer, dh.Monitor(model, data(9), every=4, optimizer=optimizer, points=["stem"])

    def go(model: Any, optimizer: Any, monitor: Monitor, steps: range) -> list[Any]:
        found = []
        for step in steps:
            torch.manual_seed(step)
            train_step(model, optimizer, data())
            found.append(monitor.step(step))
        return found

    whole = parts()
    expected = go(*whole, range(20))
    for stop in (9, 12):  # between measurements, and where the parameters are noted
        model, optimizer, monitor = parts()
        go(model, optimizer, monitor, range(stop))
        file = io.BytesIO()
        torch.save([x.state_dict() for x in (model, optimizer, monitor)], file)
        file.seek(0)
        file_elapsed = monitor.state_dict()["pace"]["elapsed"]
        resumed = parts()
        for x, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            x.load_state_dict(state)
        assert go(*resumed, range(stop, 20)) == expected[stop:]
        assert resumed[2].history == whole[2].history
        assert resumed[2]._pace.elapsed > file_elapsed > 0
    assert resumed[2].report is not None and resumed[2].report.names == ("stem",)
    with pytest.raises(errors.OptionError, match="state_dict"):
        monitor.load_state_dict({"format": "another"})
    with pytest.raises(errors.OptionError, match="NoneType"):
        monitor.load_state_dict(None)


def test_blocks_of_an_earlier_map_are_refused() -> None:
    model = net().eval()
    monitor = dh.Monitor(model, data(), every=1, points=["stem"])
    monitor.step(0)
    first = monitor.report
    block = first.block("stem", "stem")
    model.head.weight.data.mul_(2)
    with pytest.raises(errors.StaleError, match="head"):
        first.block("stem", "stem")
    monitor.step(1)
    with pytest.raises(errors.StaleError, match="later map"):
        first.block("stem", "stem")
    with pytest.raises(errors.StaleError, match="later map"):
        first.blocks()
    assert not torch.equal(monitor.report.block("stem", "stem"), block)
    assert math.isclose(float(block.norm()), first.resonance[0, 0], rel_tol=1e-9)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"every": 0}, errors.OptionError, "every=0"),
        ({"every": 2.5}, errors.OptionError, "every=2.5"),
        ({"quantities": "loss"}, errors.OptionError, "expected a list"),
        ({"quantities": ["sharpnes"]}, errors.OptionError, "'sharpness'"),
        ({"quantities": ["preconditioned"]}, errors.OptionError, "none was given"),
        ({"quantities": ["stability"]}, errors.OptionError, "SGD, Adam, AdamW"),
        ({"optimizer": "adam"}, errors.OptionError, "optimizer is a str"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, errors.PointError, "the optimizer holds"),
        ({"training": 1}, errors.OptionError, "training=1"),
        ({"threshold": 0}, errors.OptionError, "threshold=0"),
        ({"prefix": None}, errors.OptionError, "prefix=None"),
        ({"seed": -1}, errors.OptionError, "seed=-1"),
        ({"points": ["nothing"]}, errors.PointError, "nothing"),
        ({"probes": 1}, errors.OptionError, "probes=1"),
    ],
)
def test_what_cannot_be_watched_is_told_at_once(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        dh.Monitor(net(), data(), **options)


def test_other_refusals() -> None:
    with pytest.raises(errors.OptionError, match=r"torch\.nn\.Module"):
        dh.Monitor(lambda x: x, data())
    with pytest.raises(errors.PointError, match="no parameter that requires gradients"):
        dh.Monitor(net().requires_grad_(False), data())
    monitor = dh.Monitor(net(), data())
    with pytest.raises(errors.OptionError, match="step="):
        monitor.step("1")
    with pytest.raises(errors.OptionError, match="nothing was measured"):
        monitor.plot()
    climbs = torch.optim.SGD(net().parameters(), maximize=True)
    with pytest.raises(errors.OptionError, match="without maximize"):
        model = net()
        climbs = torch.optim.SGD(model.parameters(), maximize=True)
        dh.Monitor(model, data(), optimizer=climbs, quantities=["stability"])


def test_batches_may_come_from_an_iterator() -> None:
    x, y = data()
    model = net()
    monitor = dh.Monitor(model, iter(zip(x.split(5), y.split(5), strict=True)), quantities=["loss", "sharpness"])
    assert math.isclose(sharpness(monitor, 0), expected(model), rel_tol=1e-5)
    model.eval()
    assert math.isclose(monitor.history["curvature/loss"][0][1], F.cross_entropy(model(x), y).item(), rel_tol=1e-12)


def test_one_loss_of_the_model_s_own_and_prefix() -> None:
    model = net()
    monitor = dh.Monitor(model, data(), loss=nn.CrossEntropyLoss(label_smoothing=0.1), prefix="h/", points=["stem"])
    found = monitor.step(0)
    assert set(found) == {"h/loss", "h/sharpness", "h/gn_gap/stem", "h/resonance/stem", "h/abrupt", "h/failed"}
    assert "1 measurements" in repr(monitor) and monitor.seconds > 0
    titles = [axes.get_title() for axes in monitor.plot().axes if axes.get_title()]
    assert titles == [title for title, _, _ in PANELS if "update" not in title and "edge" not in title]
