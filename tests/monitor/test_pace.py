"""When it is measured: by steps, by time, along which update; and what is called an abrupt change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse import errors
from dag_hesse.monitor.changes import LEAST, change, score
from dag_hesse.monitor.pace import Pace, share
from tests.monitor.common import data, flat, matrix, net, train_step, truth


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measured(steps: Any, every: int, **options: Any) -> list[int]:
    """Steps at which something is returned, of those called."""
    monitor = dh.Monitor(net(), data(), every=every, quantities=["loss", "update"], **options)
    return [step for step in steps if monitor.step(step) is not None]


def test_multiples_are_measured_and_the_first() -> None:
    assert measured(range(1, 12), 5) == [1, 5, 10]
    assert measured(range(4), 1) == [0, 1, 2, 3]
    assert measured(range(0, 50, 10), 20) == [0, 20, 40]
    assert measured([0, 3, 6, 10, 14], 5) == [0, 6, 14]  # at 6 nobody could know that 10 comes next
    assert measured([4, 4, 5, 5, 5, 6], 5) == [4, 5]  # many batches a step
    assert measured([98, 99, 100, 0, 1, 2], 2) == [98, 100, 1, 2]  # another run


def test_without_an_update_nothing_is_noted() -> None:
    monitor = dh.Monitor(net(), data(), every=5, quantities=["loss"])
    assert [step for step in range(11) if monitor.step(step)] == [0, 5, 10]
    assert monitor._before is None


@pytest.mark.parametrize("budget", ["5%", 0.05])
def test_a_budget_is_kept(budget: Any) -> None:
    clock = Clock()
    pace = Pace(1, share(budget), clock)
    pace.cost, done = 2.0, []  # the capture
    for step in range(1000):
        pace.arrive(step)
        if pace.due(step):
            with pace.measuring(step):
                clock.now += 3.0
            done.append(step)
            assert pace.spent <= 0.05 * pace.elapsed + 1.0  # the first was thought to take 2
        clock.now += 1.0
    assert 0.04 < pace.spent / pace.elapsed <= 0.05
    assert len(done) == 17 and done[0] == 40


def test_the_budget_holds_in_a_run() -> None:
    model = net()
    monitor = dh.Monitor(model, data(), every=1, budget=0.2, quantities=["loss", "update", "sharpness"])
    clock = monitor._pace.clock = Clock()
    monitor._pace.cost = 1.0
    found, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(30):
        train_step(model, optimizer, data())
        clock.now += 1.0
        found.append(monitor.step(step))
    assert (
        next(step for step, metrics in enumerate(found) if metrics) == 6
    )  # at 5 it may take 1 s of 5, and notes parameters
    assert all("curvature/update" in metrics for metrics in found if metrics)


@pytest.mark.parametrize("budget", ["2", "0%", "100%", 0, 1.5, True, "much", -0.1, float("nan"), [1]])
def test_what_is_no_budget(budget: Any) -> None:
    with pytest.raises(errors.OptionError, match="budget="):
        dh.Monitor(net(), data(), budget=budget)


def test_the_update_is_that_of_the_last_call() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    monitor = dh.Monitor(model, data(), every=6, quantities=["update"])
    names = [name for name, _ in model.named_parameters()]
    for step in (0, 3, 6):
        before = flat(model.parameters())
        for _ in range(3):
            train_step(model, optimizer, data())
        found = monitor.step(step)
    d, h = flat(model.parameters()) - before, matrix(truth(model, data()), names)
    assert math.isclose(found["curvature/update"], float(d @ h @ d / (d @ d)), rel_tol=1e-9)


def test_no_update_no_number() -> None:
    monitor = dh.Monitor(net(), data(), every=1, quantities=["loss", "update"])
    monitor.step(0)
    found = monitor.step(1)  # as where a scaler skips a step, or the learning rate is zero
    assert set(found) == {"curvature/loss", "curvature/abrupt", "curvature/failed"} and not monitor.failures


def test_scores() -> None:
    generator = np.random.default_rng(0)
    noise = generator.standard_normal(400) * 0.2
    for series in (np.exp(noise).tolist(), np.exp(np.cumsum(noise)).tolist(), [2.0**k for k in range(40)]):
        scores = [score(x, series[:k]) for k, x in enumerate(series)]
        assert scores[: LEAST + 1] == [0.0] * (LEAST + 1)
        assert max(map(abs, scores)) < 5
    for k, x in ((200, 10.0), (200, 0.1)):
        walk = np.exp(np.cumsum(noise)).tolist()
        assert (score(x * walk[k], walk[:k]) * math.log(x)) > 5 * abs(math.log(x))
    assert score(0.0, [0.0] * 20) == 0.0
    assert score(1e-9, [0.0] * 20) == math.inf  # a part that was exactly zero
    assert score(1.005, [1.0] * 20) < 1 < 6 < score(1.1, [1.0] * 20)
    falling = [-0.1 * k for k in range(20)]
    assert abs(score(-2.0, falling)) < 3
    assert score(30.0, falling) > 6
    found = change(7, "a", 5.0, [1.0] * 20, 6.0)
    assert found is not None
    assert found.before == 1.0
    assert "step 7: a is 5 after 1" in str(found)
    assert change(7, "a", 1.0, [1.0] * 20, 6.0) is None


def test_abrupt_changes_are_flagged() -> None:
    model = nn.Linear(4, 3).double()
    x, y = data()
    monitor = dh.Monitor(model, (x, y), every=1, quantities=["loss", "sharpness"])
    found = [monitor.step(step) for step in range(15)]
    assert not any(metrics["curvature/abrupt"] for metrics in found)
    x *= 3.0
    found = monitor.step(15)
    assert found["curvature/abrupt"] == 2 == len(monitor.changes)
    assert [(c.step, c.name) for c in monitor.changes] == [(15, "curvature/loss"), (15, "curvature/sharpness")]
