"""What the ranks of the tests do with a model in training."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import dag_hesse as dh
from dag_hesse.monitor.quantities import QUANTITIES
from dag_hesse.sweep.runner import Runner
from tests.distributed.work import said, samples, shard
from tests.monitor.common import net, state_of, train_step


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Training:
    """A model in DistributedDataParallel, whose BatchNorm goes its own way on every rank."""

    def __init__(self, rank: int) -> None:
        self.inside = net()
        torch.manual_seed(rank)
        self.model = nn.parallel.DistributedDataParallel(self.inside)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.batch = torch.randn(4 + rank, 4, dtype=torch.float64), torch.arange(4 + rank) % 3

    def step(self, number: int) -> None:
        torch.manual_seed(number)
        train_step(self.model, self.optimizer, self.batch)


def monitored(rank: int, ranks: int) -> dict[str, Any]:
    """Measurements by all ranks, beside those that each makes by itself with all samples."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    watched, plain = Training(rank), Training(rank)
    options: dict[str, Any] = {"every": 2, "optimizer": watched.optimizer, "points": ["stem", "body"]}
    several = dh.Monitor(watched.model, shard(rank, ranks), mesh=mesh, **options)
    alone = dh.Monitor(watched.model, samples(), **options)
    found: dict[str, Any] = {"several": [], "alone": [], "states": [], "failures": []}
    for step in range(6):
        plain.step(step)
        found["states"].append(state_of(plain.inside, plain.optimizer))
        watched.step(step)
        found["alone"].append(alone.step(step))
        found["several"].append(several.step(step))
        assert all(map(torch.equal, found["states"][-1], state_of(watched.inside, watched.optimizer)))
    found["report"] = several.report["gn_gap"], alone.report["gn_gap"]
    found["shared"] = shared(watched, rank, ranks)
    again = dh.Monitor(watched.model, shard(rank, ranks), mesh=mesh, **options)
    again.load_state_dict(several.state_dict())
    for step in (6, 7):
        watched.step(step)
        found[f"resumed {step}"] = several.step(step), again.step(step)
    found["differ"] = said(lambda: differing(again, several, rank))
    found["refused"] = said(lambda: dh.Monitor(watched.model, shard(rank, ranks), mesh=mesh, training=True))
    found["failures"] = failing(watched, shard(rank, ranks), mesh, rank)
    found["paced"] = paced(watched.model, shard(rank, ranks), mesh, rank)
    return found


def shared(training: Training, rank: int, ranks: int) -> list[Any]:
    """One measurement by all ranks with the same samples, and by each itself."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("probe",))
    return [dh.Monitor(training.model, samples(), mesh=m, points=["stem"]).step(0) for m in (mesh, None)]


def differing(monitor: dh.Monitor, other: dh.Monitor, rank: int) -> None:
    """A state that is loaded on one rank alone."""
    state = other.state_dict()
    if not rank:
        state["pace"]["next"] = 99
    monitor.load_state_dict(state)
    monitor.step(8)


def failing(training: Training, batch: Any, mesh: DeviceMesh, rank: int) -> list[Any]:
    """What all measure, and what each says, where one of them cannot."""
    monitor = dh.Monitor(training.model, batch, 1, optimizer=training.optimizer, mesh=mesh, points=["stem"])
    weight, group = training.inside.stem[0].weight, training.optimizer.param_groups[0]

    def full(*given: Any, **options: Any) -> Any:
        raise MemoryError("nothing is left")

    def spoiled(step: int) -> Any:
        return monitor.step(step), [(name, text) for _, name, text in monitor.failures if _ == step]

    found = [spoiled(0)]
    with mock.patch.object(Runner, "run", full) if rank == 1 else nullcontext():  # in the midst of a sweep
        found.append(spoiled(1))
    with mock.patch.dict(QUANTITIES, {"sharpness": full}) if rank == 1 else nullcontext():
        found.append(spoiled(2))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = torch.nan if rank == 1 else kept[0, 0]
        found.append(spoiled(3))
        weight.copy_(kept)
    group["lr"] *= 1 + rank
    found.append(spoiled(4))
    group["lr"] /= 1 + rank
    return [*found, spoiled(5)]


def paced(net: nn.Module, batch: Any, mesh: DeviceMesh | None, rank: int) -> list[int]:
    """Steps that are measured, where the clocks of the ranks differ."""
    monitor = dh.Monitor(net, batch, 2, budget=0.1, quantities=["loss", "update"], mesh=mesh)
    clock = monitor._pace.clock = Clock()
    monitor._pace.cost, found = 0.5, []
    for step in range(30):
        before = monitor._pace.spent
        found += [step] if monitor.step(step) is not None else []
        monitor._pace.spent = before + (0.5 if found and found[-1] == step else 0.0)
        monitor._pace.cost = 0.5
        clock.now += 1.0 + 5 * rank
    return found
