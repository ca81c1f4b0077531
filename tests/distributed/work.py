"""What the ranks of the tests do with operators, maps and stored blocks; every function runs in each of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import dag_hesse as dh
from dag_hesse.errors import DagHesseError
from dag_hesse.estimate import gram
from dag_hesse.sweep.runner import Runner
from tests.monitor.common import train_step

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


def halved(output: Tensor, target: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(output, target)]).mean() / 2


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": F.cross_entropy,
    "halved": halved,
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
        "landscape": torch.from_numpy(H.landscape(v[:, 0], points=3).losses.copy()),
    }  # fmt: skip


def said(run: Callable[[], Any]) -> str:
    return saying((), run)


def saying(others: Any, run: Callable[[], Any]) -> str:
    """An error of ours, or one of others."""
    try:
        run()
    except (DagHesseError, *others) as error:
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
    fisher = dh.FisherOperator(model(), shard(rank, ranks), loss=nn.CrossEntropyLoss(ignore_index=1), mesh=mesh)
    found["fisher"] = {"one": fisher @ vectors(fisher)[:, 0]}
    found["errors"] = errors(H, mesh, rank)
    return found


def kept(output: Tensor, target: Tensor) -> Tensor:
    """Over what is above zero: how much there is depends on values."""
    return ((output - target)[target > 0] ** 2).mean() / 2


class OwnLoss(nn.Module):
    """Makes a loss over the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.table(ids)))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()) / 2, "logits": logits}


def numbers(lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """A batch a length: (samples, length, features)."""
    made = torch.Generator().manual_seed(3)
    shapes = [(3 + k % 2, n) for k, n in enumerate(lengths)]
    return [(torch.randn(*s, 4, generator=made).double(), torch.randn(*s, 3, generator=made).double()) for s in shapes]


def tokens() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(4))
    labels = ids.clone()
    labels[0, 1:], labels[3] = -100, -100  # the third batch counts nothing
    return [{"ids": ids[a:b], "labels": labels[a:b]} for a, b in ((0, 1), (1, 3), (3, 4), (4, 6))]


ADDED: dict[str, tuple[Callable[[], nn.Module], list[Any], Any]] = {  # model, batches of all ranks, loss
    "lengths": (model, numbers((2, 5, 2, 3)), lambda o, t: F.mse_loss(o, t) / 2),
    "rows by index": (model, numbers((3, 3, 3, 3, 3)), kept),
    "own loss": (lambda: OwnLoss().double(), tokens(), None),
}


def added(name: str, batches: list[Any] | None = None, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    make, every, loss = ADDED[name]
    H = dh.HessianOperator(make(), every if batches is None else batches, loss=loss, mesh=mesh)
    return {"one": H @ vectors(H)[:, 0], "loss": torch.tensor(H.loss), "gradient": H.gradient}


def added_up(rank: int, ranks: int) -> dict[str, Any]:
    """The last rank has the last batch, the others the rest by turns."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    found: dict[str, Any] = {}
    for name, (_, every, _) in ADDED.items():
        mine = every[-1:] if rank == ranks - 1 else every[rank : -1 : ranks - 1]
        found[name] = added(name, mine, mesh)
    x, y = shard(rank, ranks)[0]
    nothing = (x, y if rank else torch.ones_like(y))
    found["nothing"] = said(lambda: dh.HessianOperator(model(), nothing, loss=ignoring, mesh=mesh))
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


def wide() -> nn.Module:
    """Parameters of more directions than a sketch has."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 9), nn.SiLU(), nn.Linear(9, 3)).double()


STORED: dict[str, dict[str, Any]] = {
    "gram": {"part": "gn"},
    "exact": {"points": ["0", "2"], "parts": True},
    "one pass": {"space": "parameter", "points": ["2.weight"], "error": 0.05},
    "two passes": {"space": "parameter", "points": ["0.weight", "2.weight"], "rank": 10},
    "live": {"band": 0, "rest": "live", "part": "tensor"},
}


def stored(batch: Any, loss: Any, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """What blocks are stored as, and what they are."""
    found: dict[str, Any] = {}
    for name, options in STORED.items():
        B = dh.BlockMatrix.from_model(wide(), batch, loss=loss, mesh=mesh, progress=False, **options)
        for part in ("full", "gn", "tensor") if options.get("parts") else (B.facts["part"],):
            own = B.part(part)
            kinds = [facts.kind.value for facts in own.pairs.values()]
            found[f"{name} {part}"] = own.facts["route"], kinds, own.cores, own @ torch.eye(own.shape[1]).double()
    report = dh.analyze(wide(), batch, loss=loss, mesh=mesh, points=["0"])
    found["report"] = "", [], None, report.blocks(part="gn", progress=False).to_dense()
    return found


def stored_by_data(rank: int, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    found = stored(shard(rank, ranks), ignoring, mesh)

    def full(*given: Any) -> Any:
        raise MemoryError("nothing is left")

    for where in ((Runner, "run"), (gram, "factor_rows")):
        with mock.patch.object(*where, full) if rank == 1 else nullcontext():
            make = partial(
                dh.BlockMatrix.from_model, wide(), shard(rank, ranks), loss=ignoring, mesh=mesh, progress=False
            )
            part = "tensor" if where[0] is Runner else "gn"
            found[f"failing {part}"] = saying([MemoryError], lambda make=make, part=part: make(part=part, points=["0"]))
    found["joint"] = said(lambda: make(batch_mode="joint"))
    return found


def stored_by_probe(rank: int, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("probe",))
    found = stored(samples(), ignoring, mesh)
    x, y = samples()
    found["apart"] = said(lambda: dh.HessianOperator(wide(), (x + rank, y), loss=ignoring, mesh=mesh))
    return found


def divided(mesh: DeviceMesh) -> nn.Module:
    """A model of which every rank has a part."""
    whole = model()
    for module in (whole[0], whole[2], whole):
        fully_shard(module, mesh=mesh)
    return whole


def trained(net: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """A step of training, and what each rank has then."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train_step(net, optimizer, batch)
    return [p.to_local().detach().clone() for p in net.parameters()]


def sharded(rank: int, ranks: int) -> dict[str, Any]:
    """Parameters of which every rank has a part."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    net, plain, own = divided(mesh), divided(mesh), shard(rank, ranks)
    given: dict[str, Any] = {"loss": F.cross_entropy, "mesh": mesh}
    H = dh.HessianOperator(net, own, **given)
    found: dict[str, Any] = {"figures": figures(H)}
    found["map"] = dh.analyze(net, own, points=["0", "2"], **given).resonance
    found["blocks"] = dh.BlockMatrix.from_model(net, own, points=["0"], progress=False, **given).to_dense()
    with torch.no_grad():
        net(own[0][0])  # leaves the root's parameters gathered
    found["again"] = H @ vectors(H)[:, 0]
    found["kinds"] = [type(module).__name__ for module in net.modules()]
    found["trained"] = [trained(each, own[0]) for each in (net, plain)]
    found["stale"] = said(lambda: H @ vectors(H))
    H.refresh()
    found["refreshed"] = H @ vectors(H)[:, 0]
    found["state"] = {name: x.full_tensor() for name, x in net.state_dict().items()}
    net.eval()
    H.refresh()  # captured anew
    found["anew"] = H @ vectors(H)[:, 0]
    tensors = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    parallelize_module(tensors, mesh, {"0": ColwiseParallel(use_local_output=False)})
    found["errors"] = {
        "alone": said(lambda: dh.HessianOperator(net, own, loss=F.cross_entropy)),
        "memory": said(lambda: dh.HessianOperator(net, own, memory=100, **given)),
        "tensors": said(lambda: dh.HessianOperator(tensors, own, **given)),
        "flat": said(
            lambda: dh.HessianOperator(FullyShardedDataParallel(model(), device_id=torch.device("cpu")), own, **given)
        ),
    }
    return found


def left_alone(rank: int, ranks: int) -> str:
    """The last rank ends without a word."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    H = dh.HessianOperator(model(), shard(rank, ranks), loss=F.cross_entropy, mesh=mesh)
    if rank == ranks - 1:
        os._exit(0)
    return said(lambda: H @ vectors(H))


def enter(rank: int, ranks: int, folder: str, what: str) -> None:
    """One rank: what it found is left in a file. ``what`` is a function's module here, and its name."""
    module, name = what.split(".")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        run = getattr(import_module(f"tests.distributed.{module}"), name)
        torch.save(run(rank, ranks), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()
