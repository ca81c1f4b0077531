"""Sweeps that several ranks share: each takes some pieces of the vectors, and products of shards are added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dag_hesse.errors import VectorError
from dag_hesse.ranks import Ranks
from dag_hesse.sweep.parts import Parts, Request
from dag_hesse.sweep.runner import Progress, Runner, pieces

Found = list[dict[int, Parts]]  # per request, by read point


def run_shared(
    ranks: Ranks, runner: Runner, requests: Sequence[Request], parts: str, progress: Progress | None
) -> Found:
    """As :meth:`Runner.run`, the same on all ranks.

    The vectors are divided as one rank would divide them into chunks, so that the bits do not depend on who sweeps
    what.

    Raises:
        VectorError: ranks have other vectors.
        RankError: another rank failed.
    """
    _same_vectors(ranks, requests)
    runner.chunk = min(ranks.told("a sweep's chunk", runner.chunk))
    number, count = ranks.place
    every = [pieces(_rows(request), runner.chunk) for request in requests]
    owners = list(accumulate((len(own) for own in every), initial=0))
    mine: list[tuple[int, int]] = [
        (r, k) for r, own in enumerate(every) for k in range(len(own)) if (owners[r] + k) % count == number
    ]
    with ranks.together("a sweep"):
        asked = [Request({s: z[every[r][k]] for s, z in requests[r].z.items()}, requests[r].reads) for r, k in mine]
        swept = dict(zip(mine, runner.run(asked, parts, progress), strict=True))
    nonzero = set().union(
        *ranks.told("a sweep's parts", {(r, *key) for (r, _), found in swept.items() for key in _nonzero(found)})
    )
    keys = sorted(nonzero)
    whole = [_joined(ranks, runner, requests[r], every[r], owners[r], swept, (r, v, part)) for r, v, part in keys]
    total = dict(zip(keys, ranks.added(whole), strict=True))
    return [
        {v: Parts(total.get((r, v, "gn")), total.get((r, v, "tensor"))) for v in request.reads}
        for r, request in enumerate(requests)
    ]


def _rows(request: Request) -> int:
    return len(next(iter(request.z.values())))


def _same_vectors(ranks: Ranks, requests: Sequence[Request]) -> None:
    sums = [float(z.double().sum()) for request in requests for z in request.z.values()]
    shapes = [tuple(z.shape) for request in requests for z in request.z.values()]
    if any(said != (shapes, sums) for said in ranks.told("a sweep's vectors", (shapes, sums))) and all(
        x == x for x in sums
    ):
        raise VectorError(
            "ranks multiply with different vectors: expected the same one on all, from the same seed, say."
        )


def _nonzero(found: dict[int, Parts]) -> Iterator[tuple[int, str]]:
    for v, parts in found.items():
        yield from ((v, part) for part in ("gn", "tensor") if getattr(parts, part) is not None)


def _joined(
    ranks: Ranks,
    runner: Runner,
    request: Request,
    own: Sequence[slice],
    first: int,
    swept: dict[tuple[int, int], dict[int, Parts]],
    key: tuple[int, int, str],
) -> Tensor:
    """All rows of one part of one product: pieces come from the ranks that swept them."""
    (r, v, part), count = key, ranks.place[1]
    like = next(iter(request.z.values()))
    whole = like.new_zeros(len(like), like.shape[1], runner.meaning.dim(v))
    for k, piece in enumerate(own):
        found = getattr(swept[r, k].get(v), part, None) if (r, k) in swept else None
        rows = torch.zeros_like(whole[piece]) if found is None else found.contiguous()
        whole[piece] = ranks.sent(rows, (first + k) % count)
    return whole
