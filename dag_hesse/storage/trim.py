"""Fewer directions: those go first whose loss is least for the memory that they take.

The directions of a point are the left singular vectors of its block row of cores. Dropping one loses at most √2 times
its singular value in ‖H‖_F. Directions of all points compete, by σ² over d_v (cf. Theorem 93, which has one block).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.storage.cores import Cores, Pair


def rotate(cores: Cores, v: int) -> Tensor:
    """Turn a point's basis to the singular vectors of its row of cores; returns singular values (groups, r_v)."""
    partners = [w for w in range(len(cores.dims)) if (min(v, w), max(v, w)) in cores.cores]
    rank = cores.rank(v)
    if not partners:
        return torch.zeros(cores.groups, rank, dtype=torch.float64)
    row = torch.cat([cores.core(v, w).double() for w in partners], dim=-1)
    gram = row @ row.mT
    vectors = torch.linalg.eigh((gram + gram.mT) / 2)[1].flip(-1)
    turned = vectors.mT @ row
    turn, basis = vectors.to(_like(cores).dtype), cores.bases[v]
    cores.bases[v] = turn if basis is None else basis @ turn
    for w in partners:
        if w == v:
            both = turn.mT @ cores.cores[v, v] @ turn
            cores.cores[v, v] = (both + both.mT) / 2
        elif v < w:
            cores.cores[v, w] = turn.mT @ cores.cores[v, w]
        else:
            cores.cores[w, v] = cores.cores[w, v] @ turn
    return turned.norm(dim=-1)


def trim(
    cores: Cores, allowed: float, most_bytes: int | None, most_rank: int | None = None
) -> dict[tuple[int, int], float]:
    """Drop directions for a loss of at most ``allowed`` (Frobenius), then until ``most_bytes`` hold it.

    Points that keep their coordinates are left alone, unless memory does not suffice otherwise.

    Returns:
        Per stored pair, ‖what it lost‖_F.
    """
    lost = dict.fromkeys(cores.cores, 0.0)
    squeezed = [v for v, basis in enumerate(cores.bases) if basis is not None]
    _drop(cores, squeezed, allowed, most_bytes, most_rank, lost)
    if most_bytes is not None and cores.bytes > most_bytes:
        _drop(cores, [v for v, d in enumerate(cores.dims) if d > 1], 0.0, most_bytes, None, lost)
    return {pair: x**0.5 for pair, x in lost.items()}


def _like(cores: Cores) -> Tensor:
    return next(iter(cores.cores.values()))


def _drop(
    cores: Cores,
    points: list[int],
    allowed: float,
    most_bytes: int | None,
    most_rank: int | None,
    losses: dict[Pair, float],
) -> None:
    values = {v: rotate(cores, v) for v in points}
    keep = {v: s.shape[-1] for v, s in values.items()}
    top = max((float(s.max()) for s in values.values()), default=0.0)
    noise = top * torch.finfo(_like(cores).dtype).eps
    lost = 0.0
    gains = sorted(
        (2 * float(s[:, k].pow(2).sum()) / cores.dims[v], v, k) for v, s in values.items() for k in range(s.shape[-1])
    )
    for gain, v, k in gains:
        if keep[v] == 1:
            continue
        loss = gain * cores.dims[v]
        free = loss <= noise**2 or lost + loss <= allowed**2 or (most_rank is not None and k >= most_rank)
        if not free and (most_bytes is None or _bytes(cores, keep) <= most_bytes):
            if most_rank is None:
                break
            continue
        lost += loss
        keep[v] = min(keep[v], k)
    for v in points:
        cut(cores, v, max(1, keep[v]), losses)


def _bytes(cores: Cores, keep: dict[int, int]) -> int:
    """What is left with so many directions a point."""
    ranks = [keep.get(v, cores.rank(v)) for v in range(len(cores.dims))]
    bases = sum(d * r for d, r, b in zip(cores.dims, ranks, cores.bases, strict=True) if b is not None)
    return cores.groups * _like(cores).element_size() * (bases + sum(ranks[v] * ranks[w] for v, w in cores.cores))


def cut(cores: Cores, v: int, rank: int, losses: dict[Pair, float]) -> None:
    """Keep the first directions of a point; what each pair loses of ‖·‖_F² is added to ``losses``."""
    basis = cores.bases[v]
    if basis is None or rank >= basis.shape[-1]:
        return
    cores.bases[v] = basis[..., :rank].clone()
    for (a, b), x in list(cores.cores.items()):
        if v not in (a, b):
            continue
        gone = 0.0
        if a == v:
            gone, x = gone + float(x[:, rank:].double().pow(2).sum()), x[:, :rank]
        if b == v:
            gone, x = gone + float(x[..., rank:].double().pow(2).sum()), x[..., :rank]
        losses[a, b] += gone
        cores.cores[a, b] = x.clone()
