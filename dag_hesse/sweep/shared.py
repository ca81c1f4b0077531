"""Sweeps that several ranks share: each takes some pieces of the vectors, and products of shards are added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from torch import Tensor

from dag_hesse.alike import content
from dag_hesse.errors import RankError, VectorError
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
    runner.chunk = _agreed_chunk(ranks, runner.chunk, requests, parts)
    number, count = ranks.place
    every = [pieces(_rows(request), runner.chunk) for request in requests]
    owners = list(accumulate((len(own) for own in every), initial=0))
    mine: list[tuple[int, int]] = [
        (r, k) for r, own in enumerate(every) for k in range(len(own)) if (owners[r] + k) % count == number
    ]
    with ranks.together("a sweep"):
        asked = [Request({s: z[every[r][k]] for s, z in requests[r].z.items()}, requests[r].reads) for r, k in mine]
        swept = dict(zip(mine, runner.run(asked, parts, progress), strict=True))
    found = {(r, *key) for (r, _), part in swept.items() for key in _nonzero(part)}
    said = ranks.told("a sweep's parts", (found, runner.chunk))  # memory may have run out on one of them
    runner.chunk = min(chunk for _, chunk in said)
    keys = sorted(set().union(*(nonzero for nonzero, _ in said)))
    with ranks.together("a sweep's sum"):
        whole = [_own(runner, requests[r], every[r], swept, (r, v, part)) for r, v, part in keys]
    for (r, _, _), rows in zip(keys, whole, strict=True):
        for k, piece in enumerate(every[r]):
            ranks.sent(rows[piece], (owners[r] + k) % count)
    total = dict(zip(keys, ranks.added(whole), strict=True))
    return [
        {v: Parts(total.get((r, v, "gn")), total.get((r, v, "tensor"))) for v in request.reads}
        for r, request in enumerate(requests)
    ]


def _rows(request: Request) -> int:
    return len(next(iter(request.z.values())))


def _agreed_chunk(ranks: Ranks, chunk: int, requests: Sequence[Request], parts: str) -> int:
    """The smallest of the ranks' chunks, where all have the same vectors, and read the same from them."""
    asked = [(list(request.z), tuple(request.reads), parts) for request in requests]
    vectors = [content(z) for request in requests for z in request.z.values()]
    said = ranks.told("a sweep's vectors", (asked, vectors, chunk))
    if any(theirs != asked for theirs, _, _ in said):
        raise RankError("ranks multiply other blocks, or other parts: expected the same product on all.")
    if any(theirs != vectors for _, theirs, _ in said):
        raise VectorError(
            "ranks multiply with different vectors: expected the same one on all, from the same seed, say."
        )
    return min(theirs for *_, theirs in said)


def _nonzero(found: dict[int, Parts]) -> Iterator[tuple[int, str]]:
    for v, parts in found.items():
        yield from ((v, part) for part in ("gn", "tensor") if getattr(parts, part) is not None)


def _own(
    runner: Runner,
    request: Request,
    pieces: Sequence[slice],
    swept: dict[tuple[int, int], dict[int, Parts]],
    key: tuple[int, int, str],
) -> Tensor:
    """All rows of one part of one product, zero where they were not swept here."""
    r, v, part = key
    like = next(iter(request.z.values()))
    whole = like.new_zeros(len(like), like.shape[1], runner.meaning.dim(v))
    for k, piece in enumerate(pieces):
        found = getattr(swept[r, k].get(v), part, None) if (r, k) in swept else None
        if found is not None:
            whole[piece] = found
    return whole
