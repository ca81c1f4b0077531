"""What ranks say that are given something else than the others are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import dag_hesse as dh
from tests.distributed.work import ignoring, model, said, samples, vectors


class Applied(nn.Module):
    """A model whose forward applies a function that no module says."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.function = nn.Linear(4, 3).double(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inside(x))


def of(*between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *between, nn.Linear(6, 3)).double()


def rewritten(rank: int, change: Callable[[Tensor], Tensor]) -> nn.Module:
    net = model()
    if rank:
        with torch.no_grad():
            net[0].weight.copy_(change(net[0].weight.clone()))
    return net


def two_signs(w: Tensor) -> Tensor:
    w[:2, 0] *= -1
    return w


def unlike(rank: int, ranks: int) -> dict[str, str]:
    """What all ranks say where one of them asks for something else; they are in step afterwards."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    x, y = samples()
    even, uneven = (x[rank * 5 : rank * 5 + 5], y[rank * 5 : rank * 5 + 5]), (x[: 4 + rank], y[: 4 + rank])
    given: dict[str, Any] = {"loss": F.cross_entropy, "mesh": mesh}
    function = torch.sin if rank else torch.sigmoid
    mine = (lambda o, t: 2 * F.cross_entropy(o, t)) if rank else (lambda o, t: F.cross_entropy(o, t))
    weight = torch.tensor([1.0, 2.0, 3.0 + rank]).double()
    dropout = of(nn.Dropout()).train(bool(rank))
    H = dh.HessianOperator(model(), even, **given)
    D = dh.HessianOperator(of(nn.Dropout()).eval(), even, **given)
    D.model.train(bool(rank))
    v, k = vectors(H)[:, 0], 1 + rank
    report = dh.analyze(model(), even, points=["0", "2", "4"], **given)

    def operator(net: nn.Module, batch: Any = even, kind: Any = dh.HessianOperator, **options: Any) -> Any:
        return lambda: kind(net, batch, **{**given, **options})

    def mapped(**options: Any) -> Any:
        return lambda: dh.analyze(model(), even, **given, **options)

    calls: dict[str, Callable[[], Any]] = {
        "activation module": operator(of(nn.Softplus() if rank else nn.Tanh())),
        "setting of a module": operator(of(nn.Softplus(1.0 + rank))),
        "activation function": operator(Applied(function)),
        "function of another size": operator(Applied(function), uneven),
        "order of rows": operator(rewritten(rank, lambda w: w.flip(0))),
        "two signs": operator(rewritten(rank, two_signs)),
        "loss": operator(model(), loss=ignoring if rank else F.cross_entropy),
        "lambda": operator(model(), loss=mine, reduction="mean"),
        "weights of a loss": operator(model(), loss=nn.CrossEntropyLoss(weight=weight)),
        "inferred loss": operator(model(), (even[0], torch.ones(5, 3).double()) if rank else even, loss=None),
        "mode of dropout": operator(dropout),
        "operator": operator(model(), kind=dh.GGNOperator if rank else dh.HessianOperator),
        "points": operator(of(nn.Tanh()), space="activation", points=["1"] if rank else ["0"]),
        "params": operator(model(), params=["0.bias", "0.weight"] if rank else ["0.weight", "0.bias"]),
        "drawn targets": operator(model(), kind=partial(dh.FisherOperator, kind="mc"), seed=rank, reduction="mean"),
        "kind of call": mapped(points=["0"]) if rank else operator(model(), space="activation", points=["0"]),
        "map mode": mapped(mode="probes" if rank else "exact"),
        "map probes": mapped(mode="probes", probes=8 * k),
        "map seed": mapped(mode="probes", seed=rank),
        "map rtol": mapped(rtol=0.1 * k),
        "map pairs": mapped(points=["0", "2", "4"], pairs=[("2", "4") if rank else ("0", "4")]),
        "stored error": lambda: dh.BlockMatrix.from_model(model(), even, error=0.1 * k, progress=False, **given),
        "monitor": lambda: dh.Monitor(model(), even, loss=ignoring if rank else F.cross_entropy, mesh=mesh),
        "refreshed": D.refresh,
        "eigsh": lambda: H.eigsh(k),
        "option of eigsh": lambda: H.eigsh(1, which="SA" if rank else "LA"),
        "eigsh of a sum": lambda: (2 * H + H.shifted(1.0)).eigsh(k),
        "eigsh of a block": lambda: H["0.weight", "0.weight"].eigsh(k),
        "top_eigenvectors": lambda: H.top_eigenvectors(k),
        "trace": lambda: H.trace(20 + rank),
        "diagonal": lambda: H.diagonal(20, seed=rank),
        "spectral_density": lambda: H.spectral_density(5 + rank),
        "solve": lambda: H.solve(v.flip(0) if rank else v),
        "landscape": lambda: H.landscape(v, points=5 if rank else 3),
        "block": lambda: H["2.bias" if rank else "0.bias", "4.bias"] @ v[:3],
        "order of a vector": lambda: H @ (v.flip(0) if rank else v),
        "block of a report": lambda: report.block("2" if rank else "0", "4"),
    }
    found = {name: said(call) for name, call in calls.items()}
    step: list[Any] = [None] * ranks
    dist.all_gather_object(step, "the user's own")
    assert step == ["the user's own"] * ranks
    return found


def _by_size(z: Tensor) -> Tensor:
    return z - z.mean(0) if len(z) > 4 else 2 * z


def _by_value(z: Tensor) -> Tensor:
    return z.sigmoid() if float(z.detach().sum()) > 0 else z.tanh()


def likewise(rank: int, ranks: int) -> dict[str, str]:
    """What may be another one on every rank."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    given: dict[str, Any] = {"loss": F.cross_entropy, "mesh": mesh}
    x, y = samples()
    batch, several = (x[: 4 + rank], y[: 4 + rank]), [(x[k : k + 2], y[k : k + 2]) for k in range(0, 4 + 4 * rank, 2)]
    sign = (2 * rank - 1) * float(Applied(torch.clone)(x[:4]).sum().sign())  # of either branch one rank
    dropout = of(nn.Dropout()).train()
    torch.manual_seed(rank)
    return {
        "sizes": said(lambda: dh.HessianOperator(model(), batch, **given)),
        "numbers of batches": said(lambda: dh.HessianOperator(model(), several, **given)),
        "draws": said(lambda: dh.HessianOperator(dropout, batch, **given)),
        "branches by size": said(lambda: dh.HessianOperator(Applied(_by_size), batch, reduction="mean", **given)),
        "branches by value": said(lambda: dh.HessianOperator(Applied(_by_value), (sign * x[:4], y[:4]), **given)),
    }
