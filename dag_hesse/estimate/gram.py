"""Exact Gauss–Newton norms without probes (design §3, Gram route).

∇²L = R Σ Rᵀ with Σ = diag(±1) (all + for a convex loss). Adjoint passes from R's columns give S_v, and
H_GN[v, w] = S_vᵀ Σ S_w. Where S has more columns than rows its norms come from Gram matrices of the size of the
batches' outputs; where it has more rows, as over many batches, the blocks themselves are added up, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dag_hesse.estimate.exact import spectral_norm
from dag_hesse.estimate.norms import Array, NormTable
from dag_hesse.ir import CurvatureGraph
from dag_hesse.plan.gram import gram_in_blocks
from dag_hesse.ranks import Ranks, together
from dag_hesse.sweep import AnyLinearization, Problem, pullback, sweep
from dag_hesse.sweep.embed import joined, to_tensor, to_vector
from dag_hesse.sweep.meaning import Entry


def _sizes(graph: CurvatureGraph, embedding: str) -> list[int]:
    """Lengths of the out tensors' vectors."""
    numels = [graph.nodes[k].numel for k in graph.out]
    return numels if embedding == "whole" else [n // graph.batch_size for n in numels]


def _out_tensors(graph: CurvatureGraph, z: Tensor, embedding: str) -> dict[int, Tensor]:
    pieces = z.split(_sizes(graph, embedding), dim=-1)
    return {
        k: to_tensor(piece, graph.nodes[k].shape, graph.batch_axes[k], embedding)
        for k, piece in zip(graph.out, pieces, strict=True)
    }


def _out_vector(graph: CurvatureGraph, found: dict[int, Tensor], like: Tensor, embedding: str) -> Tensor:
    vectors = [
        to_vector(
            found.get(k, like.new_zeros(1).expand(like.shape[0], *graph.nodes[k].shape)),
            graph.nodes[k].shape,
            graph.batch_axes[k],
            embedding,
        )
        for k in graph.out
    ]
    return torch.cat(vectors, dim=-1)


def loss_hessian(graph: CurvatureGraph, lin: AnyLinearization, chunk: int, device: torch.device) -> Tensor:
    """∇²L over ``out``: (batch, C, C) per sample where the loss separates, else (1, B·C, B·C)."""
    embedding = "each" if graph.separable_loss else "whole"
    size = sum(_sizes(graph, embedding))
    eye = torch.eye(size, dtype=graph.nodes[graph.loss].dtype, device=device)[:, None, :]
    rows = []
    for piece in eye.split(chunk):
        seeds = _out_tensors(graph, piece, "sum" if embedding == "each" else embedding)
        found = sweep(lin, seeds, graph.out, "full")
        rows.append(_out_vector(graph, {k: a.data for k, a in found.items()}, piece, embedding))
    return torch.cat(rows).transpose(0, 1)


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """R (…, C, r) and signs (…, r) with R diag(signs) Rᵀ = ∇²L; directions null for every sample are dropped."""
    symmetric = 0.5 * (hessian + hessian.mT).double()
    values, vectors = torch.linalg.eigh(symmetric)
    size = values.abs()
    floor = size.max() * torch.finfo(hessian.dtype).eps * values.shape[-1]
    keep = (size > floor).any(0)
    roots = vectors[..., keep] * size[..., keep].sqrt().unsqueeze(-2)
    return roots.to(hessian.dtype), torch.where(values[..., keep] < 0, -1.0, 1.0)


def _columns(entry: Entry, roots: Tensor, alone: bool, separable: bool) -> Iterator[tuple[Tensor, str]]:
    """Columns at out, (rows, groups, size) each, and how they are embedded."""
    if not separable:
        yield roots.permute(2, 0, 1), "whole"
        return
    columns = roots.permute(2, 0, 1)  # (r, batch, C)
    if alone:
        yield columns, "each"
        return
    samples = range(columns.shape[1]) if entry.sample is None else [entry.sample]
    for b in samples:
        only = torch.zeros_like(columns)
        only[:, b] = columns[:, b]
        yield only, "each"


def factor_rows(
    problem: Problem, entry: Entry, lin: AnyLinearization, progress: Callable[[int], None] | None
) -> tuple[list[Tensor], Tensor]:
    """Per point S_v (groups, rows, dim), and signs (groups, rows)."""
    graph, points = entry.graph, entry.points
    separable = graph.separable_loss
    roots, signs = _factor(loss_hessian(graph, lin, 4 * problem.chunk, problem.device))
    unbatched = any(p.kind == "parameter" or any(graph.batch_axes[k] is None for k in p.sites) for p in points)
    alone = separable and graph.separable and not unbatched and entry.sample is None
    embedding = "each" if alone else problem.embedding
    sites = {k for point in points for k in point.sites}
    parts: list[list[Tensor]] = [[] for _ in points]
    for z, at_out in _columns(entry, roots, alone, separable):
        for piece in z.split(2 * problem.chunk):
            found = pullback(lin, _out_tensors(graph, piece, at_out), sites, embedding)
            for rows, point in zip(parts, points, strict=True):
                rows.append(joined(graph, point, found, piece, embedding))
            if progress is not None:
                progress(piece.shape[0])
    stacked = _joined(parts)  # (rows, groups or batch, dim)
    if alone:
        rows = [s.transpose(0, 1) for s in stacked]  # (batch, r, dim)
        if problem.separate_groups:
            return rows, signs
        return [s.reshape(1, -1, s.shape[-1]) for s in rows], signs.reshape(1, -1)
    if separable and entry.sample is not None:
        signs = signs[entry.sample : entry.sample + 1]
    return [s.transpose(0, 1) for s in stacked], signs.reshape(1, -1)


def _joined(parts: list[list[Tensor]], axis: int = 0) -> list[Tensor]:
    """Per point its pieces one behind the other; they are let go point by point, so that memory is not taken twice."""
    return [torch.cat(parts.pop(0), axis) for _ in range(len(parts))]


def _gram_roots(s: Tensor) -> Tensor:
    """A matrix G (rows, rank) with G Gᵀ = S Sᵀ: S itself, or from the eigenvectors of its Gram matrix."""
    if s.shape[1] <= s.shape[0]:
        return s.double().cpu()
    values, vectors = torch.linalg.eigh((s @ s.T).double().cpu())
    keep = values > values[-1:] * torch.finfo(values.dtype).eps * len(values)
    return vectors[:, keep] * values[keep].sqrt()


@dataclass(frozen=True)
class GramFactors:
    """H_GN[v, w] = S_vᵀ Σ S_w: per point and group S (rows, dim), and per group the signs Σ (rows,)."""

    rows: list[list[Tensor]]
    signs: list[Tensor]

    def product(self, v: int, w: int, z: Tensor) -> Tensor:
        """H_GN[v, w] z: (probes, groups, d_w) -> (probes, groups, d_v)."""
        parts = [
            ((z[:, g] @ s_w.T) * sign) @ s_v
            for g, (s_v, s_w, sign) in enumerate(zip(self.rows[v], self.rows[w], self.signs, strict=True))
        ]
        return torch.stack(parts, dim=1)

    def enter(self, table: NormTable, full: set[tuple[int, int]]) -> dict[tuple[int, int], Array]:
        """Enter exact GN norms of all pairs; pairs in ``full`` have no tensor part: these are the block's own norms.

        Returns:
            ‖H_GN‖_F² per pair and group.
        """

        def cores() -> Iterator[tuple[tuple[int, int], int, Tensor]]:
            for g, sign in enumerate(self.signs):
                roots = [_gram_roots(rows[g]) for rows in self.rows]
                sigma = sign.double().cpu()[:, None]
                for v, w in _pairs(len(roots)):
                    yield (v, w), g, roots[v].T @ (sigma * roots[w])

        return _entered(cores(), len(self.rows), len(self.signs), table, full)


@dataclass(frozen=True)
class GramBlocks:
    """H_GN[v, w] itself (d_v, d_w) for v ≤ w, added up over batches: one group."""

    blocks: dict[tuple[int, int], Tensor]

    def add(self, rows: list[Tensor], signs: Tensor) -> None:
        """Add a batch's S (rows, dim) per point."""
        wide = [s.double() for s in rows]
        for v, w in _pairs(len(wide)):
            term = (wide[v] * signs.double()[:, None]).T @ wide[w]
            self.blocks[v, w] = self.blocks[v, w].add_(term) if (v, w) in self.blocks else term

    def product(self, v: int, w: int, z: Tensor) -> Tensor:
        """H_GN[v, w] z: (probes, 1, d_w) -> (probes, 1, d_v)."""
        block = self.blocks[v, w].T if v <= w else self.blocks[w, v]
        return z @ block.to(z.dtype)

    def enter(self, table: NormTable, full: set[tuple[int, int]]) -> dict[tuple[int, int], Array]:
        """As :meth:`GramFactors.enter`."""
        count = max(w for _, w in self.blocks) + 1
        cores = ((pair, 0, block) for pair, block in self.blocks.items())
        return _entered(cores, count, 1, table, full)


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(v, w) for v in range(count) for w in range(v, count)]


def _entered(
    cores: Iterator[tuple[tuple[int, int], int, Tensor]],
    count: int,
    groups: int,
    table: NormTable,
    full: set[tuple[int, int]],
) -> dict[tuple[int, int], Array]:
    """Enter the norms of matrices that have the blocks' singular values, per pair and group."""
    squares = {pair: np.zeros(groups) for pair in _pairs(count)}
    spectral = {pair: np.zeros(groups) for pair in full}
    for pair, g, core in cores:
        squares[pair][g] = float(core.square().sum())
        if pair in full:
            spectral[pair][g] = spectral_norm(core)
    for pair, value in squares.items():
        if pair not in table.frobenius["gn"]:  # zero by structure, or not asked for
            table.set_exact("gn", pair, value)
        if pair in full:
            table.set_exact("full", pair, value)
            table.spectral[pair] = (spectral[pair], np.zeros(groups))
    return squares


def gram_factors(problem: Problem, progress: Callable[[int], None] | None = None) -> GramFactors | GramBlocks:
    """Adjoint passes from the factors of ∇²L through all batches: of S or of blocks, what takes less room is kept."""
    dims = [problem.dim(k) for k in range(len(problem.points))]
    height = sum(entry.graph.nodes[k].numel for entry in problem.entries for k in entry.graph.out)
    if problem.ranks is not None:
        height = sum(problem.ranks.of_shards("rows", height))
    if not problem.separate_groups and gram_in_blocks(height, dims):
        return _gram_blocks(problem, progress)
    rows: list[list[Tensor]] = [[] for _ in problem.points]
    signs: list[Tensor] = []
    for entry, lin in problem.linearizations():
        found, sign = factor_rows(problem, entry, lin, progress)
        for k, part in enumerate(found):
            rows[k].append(part if entry.scale == 1.0 else part * entry.scale**0.5)
        signs.append(sign.to(found[0].dtype))
    if problem.separate_groups:  # every sample has rows of its own
        return GramFactors([[s for part in r for s in part] for r in rows], [s for part in signs for s in part])
    del found
    whole, sign = _joined(rows, 1), torch.cat(signs, 1)  # one group holds the rows of all batches
    if problem.ranks is not None:
        *whole, sign = _of_all_shards(problem.ranks, [*whole, sign])
    return GramFactors([list(s) for s in whole], list(sign))


def _of_all_shards(ranks: Ranks, tensors: list[Tensor]) -> list[Tensor]:
    """Rows of every shard, one behind the other."""
    every = ranks.of_shards("rows of S", [x.cpu() for x in tensors])
    return [torch.cat(pieces, 1).to(x.device) for x, pieces in zip(tensors, zip(*every, strict=True), strict=True)]


def _gram_blocks(problem: Problem, progress: Callable[[int], None] | None) -> GramBlocks:
    found = GramBlocks({})
    with together(problem.ranks, "adding up blocks"):
        for entry, lin in problem.linearizations():
            rows, signs = factor_rows(problem, entry, lin, progress)
            found.add([entry.scale**0.5 * part[0] for part in rows], signs[0])
    if problem.ranks is None:
        return found
    return GramBlocks(dict(zip(found.blocks, problem.ranks.added(list(found.blocks.values())), strict=True)))
