"""Which way to bases and cores: exact columns, Gram factors, or a sketch."""

from __future__ import annotations

import torch

from dag_hesse.estimate.gram import GramBlocks, gram_factors
from dag_hesse.plan.gram import can_gram, columns_of
from dag_hesse.storage.cores import Cores, Pair
from dag_hesse.storage.draft import Draft, core, exact, from_factors, two_passes
from dag_hesse.storage.options import Wanted
from dag_hesse.storage.sketch import START, sketched, small
from dag_hesse.storage.source import Source

_ROWS = 1024  # most rows of Gram factors: beyond, a sketch asks for fewer products


def drafted(source: Source, wanted: Wanted, gn_alone: bool) -> Draft:
    """All pairs that are not proved zero; ``gn_alone``: the part is Gauss–Newton, or has no other."""
    dims = source.dims
    if gn_alone and _gram_fits(source, wanted):
        return _gram(source)
    if wanted.error == 0.0 or all(small(d, START) for d in dims):
        return _exact(source)
    room = source.room() // 3
    if wanted.memory is not None:
        room = min(room, 2 * wanted.memory)  # trimming comes after
    most = room // (source.groups * sum(dims) * source.dtype.itemsize)
    return sketched(source, wanted.error, wanted.rank, most)


def _exact(source: Source) -> Draft:
    return exact(two_passes(source, [None] * len(source.dims)))


def _columns(source: Source) -> tuple[int, int]:
    """(pullbacks, rows of S) of the Gram route, over all batches: pullbacks of this rank, rows of all."""
    counted = [columns_of(entry.graph) for entry in source.problem.entries]
    pullbacks, rows = sum(c for c, _ in counted), sum(r for _, r in counted)
    ranks = source.problem.ranks
    return pullbacks, rows if ranks is None else sum(ranks.of_shards("rows of S", rows))


def _gram_fits(source: Source, wanted: Wanted) -> bool:
    problem, (_, rows) = source.problem, _columns(source)
    room = source.room() // 4
    if wanted.memory is not None:
        room = min(room, 2 * wanted.memory)
    held = rows * sum(source.dims) * source.dtype.itemsize
    return problem.with_out and can_gram(problem.graphs) and rows <= _ROWS and held <= room


def _gram(source: Source) -> Draft:
    """H_GN[v, w] = S_vᵀ Σ S_w (design §3, Gram route): exact."""
    (expected, _), done = _columns(source), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        source.tell("gram", done, max(done, expected))

    found, dtype, dims = gram_factors(source.problem, tell), source.dtype, source.dims
    if isinstance(found, GramBlocks):
        blocks: dict[Pair, torch.Tensor] = {p: core(found.blocks[p][None].to(dtype), *p) for p in source.pairs()}
        cores = Cores(dims, source.groups, [None] * len(dims), blocks)
    else:
        signs = torch.stack(found.signs).to(dtype)
        cores = from_factors(source, [torch.stack(rows).to(dtype) for rows in found.rows], signs)
    return exact(cores, "gram", done)
