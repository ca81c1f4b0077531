"""What the ranks of the tests do; every function runs in each of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import dag_hesse as dh
from dag_hesse.errors import DagHesseError

SAMPLES = 11


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 3)).double()


def ignoring(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, ignore_index=1)


def weighing(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, weight=torch.tensor([1.0, 2.0, 5.0], dtype=output.dtype))


def summing(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="sum")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": F.cross_entropy,
    "ignoring": ignoring,
    "weighing": weighing,
    "summing": summing,
}


def samples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(SAMPLES, 4).double(), torch.arange(SAMPLES) % 3


def shard(rank: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """Uneven: the first rank has the most, in two batches."""
    x, y = samples()
    cuts = [0, SAMPLES - 2 * (ranks - 1), *range(SAMPLES - 2 * (ranks - 1) + 2, SAMPLES + 1, 2)]
    start, stop = cuts[rank], cuts[rank + 1]
    middle = start + 1
    return [(x[start:middle], y[start:middle]), (x[middle:stop], y[middle:stop])]


def vectors(H: dh.HessianOperator, count: int = 5) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(H.shape[1], count, dtype=torch.float64)


def figures(H: dh.HessianOperator) -> dict[str, Any]:
    """What is compared between one process and several."""
    v = vectors(H)
    gn, tensor = H.parts(v)
    return {
        "loss": torch.tensor(H.loss), "gradient": H.gradient, "one": H @ v[:, 0], "many": H @ v, "gn": gn, "tensor": tensor,
        "top": torch.from_numpy(H.eigsh(1, tol=1e-8, which="LA")[0].copy()), "block": H["0.weight", "4"] @ v[-18:, :2],
    }  # fmt: skip


def said(run: Callable[[], Any]) -> str:
    try:
        run()
    except DagHesseError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def by_data(rank: int, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    found: dict[str, Any] = {}
    for name, loss in LOSSES.items():
        H = dh.HessianOperator(model(), shard(rank, ranks), loss=loss, mesh=mesh)
        found[name] = figures(H)
    A = dh.HessianOperator(model(), shard(rank, ranks), loss=F.cross_entropy, space="activation", mesh=mesh)
    found["activations"] = {"many": A @ vectors(A)}
    wrapped = nn.parallel.DistributedDataParallel(model())
    W = dh.GGNOperator(wrapped, shard(rank, ranks), loss=F.cross_entropy, mesh=mesh)
    found["wrapped"] = {"one": W @ vectors(W)[:, 0]}
    found["errors"] = errors(H, mesh, rank)
    return found


MAPS: dict[str, dict[str, Any]] = {
    "auto": {},  # by Gram factors, with rows on all ranks
    "parameters": {"space": "parameter", "points": ["0.weight", "2.bias", "4"]},
    "exact": {"mode": "exact"},
    "probes": {"mode": "probes", "probes": 16},
    "blocks": {"mode": "gram", "points": ["3"]},  # fewer numbers in the block than in the rows
    "to an error": {"mode": "probes", "probes": 8, "rtol": 0.2},
}


def maps(batch: Any, loss: Any, mesh: DeviceMesh | None = None) -> dict[str, dh.CurvatureReport]:
    return {name: dh.analyze(model(), batch, loss=loss, mesh=mesh, **options) for name, options in MAPS.items()}


def map_by_data(rank: int, ranks: int) -> dict[str, Any]:
    return maps(shard(rank, ranks), ignoring, init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",)))


def map_by_probe(rank: int, ranks: int) -> dict[str, Any]:
    return maps(samples(), ignoring, init_device_mesh("cpu", (ranks,), mesh_dim_names=("probe",)))


def errors(H: dh.HessianOperator, mesh: DeviceMesh, rank: int) -> dict[str, str]:
    """What every rank says where one is wrong; all go on together afterwards."""
    stranger = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    bad = (torch.full((2, 4), torch.nan if rank else 1.0).double(), torch.tensor([0, 1]))
    apart = torch.ones(H.shape[1], dtype=torch.float64) * (1 + rank)
    texts = {
        "batch": said(lambda: dh.HessianOperator(model(), bad, loss=F.cross_entropy, mesh=mesh)),
        "vector": said(lambda: H @ apart),
        "norm": said(lambda: dh.HessianOperator(stranger, samples(), loss=F.cross_entropy, mesh=mesh)),
        "joint": said(lambda: dh.HessianOperator(model(), samples(), loss=F.cross_entropy, batch_mode="joint", mesh=mesh)),
        "no mesh": said(lambda: dh.HessianOperator(model(), samples(), loss=F.cross_entropy, mesh="data")),
        "names": said(lambda: dh.HessianOperator(model(), samples(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))),
    }  # fmt: skip
    other = model()
    if rank:
        with torch.no_grad():
            H.model[0].weight.add_(1.0)
            other[2].bias[1] += 1e-9
    texts["model"] = said(lambda: dh.HessianOperator(other, samples(), loss=F.cross_entropy, mesh=mesh))
    texts["map"] = said(lambda: dh.analyze(other, samples(), loss=F.cross_entropy, mesh=mesh))
    texts["stale"] = said(lambda: H @ torch.ones(H.shape[1], dtype=torch.float64))
    texts["refreshed"] = said(H.refresh)
    return texts


def by_probe(rank: int, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("probe",))
    H = dh.HessianOperator(model(), samples(), loss=F.cross_entropy, mesh=mesh)
    H._problem.chunk = 2
    return {"mean": figures(H)}


def by_both(rank: int, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "probe"))
    H = dh.HessianOperator(model(), shard(mesh.get_local_rank("data"), 2), loss=ignoring, mesh=mesh)
    H._problem.chunk = 2
    return {"ignoring": figures(H)}


def sharded(rank: int, ranks: int) -> str:
    """Parameters of which every rank has a part."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    net = model()
    fully_shard(net, mesh=mesh)
    return said(lambda: dh.HessianOperator(net, shard(rank, ranks), loss=F.cross_entropy, mesh=mesh))


def left_alone(rank: int, ranks: int) -> str:
    """The last rank ends without a word."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    H = dh.HessianOperator(model(), shard(rank, ranks), loss=F.cross_entropy, mesh=mesh)
    if rank == ranks - 1:
        os._exit(0)
    return said(lambda: H @ vectors(H))


def enter(rank: int, ranks: int, folder: str, what: str) -> None:
    """One rank: what it found is left in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        torch.save(globals()[what](rank, ranks), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()
