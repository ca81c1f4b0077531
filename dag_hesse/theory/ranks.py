"""Ranks of blocks between points: the bound by cuts, numerical ranks, and two effective dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dag_hesse._capture.losses import Loss
from dag_hesse._structure import analyze_structure
from dag_hesse.budget import human
from dag_hesse.errors import MemoryBudgetError
from dag_hesse.estimate import exact_blocks
from dag_hesse.measure import available_memory
from dag_hesse.theory.scene import Names, Scene, pose
from dag_hesse.theory.text import table

Array = NDArray[np.float64]
_PARTS = ("full", "gn")
_ROUNDING = 100.0  # rounding units that a singular value may be off by, times the block's longer side


@dataclass(frozen=True)
class Spectra:
    """Ranks of n×n blocks; with samples, the last axis counts them.

    Attributes:
        rank: singular values above ``100 · max(d_v, d_w)`` rounding units of the largest.
        stable_rank: D = ‖H‖_F²/‖H‖₂² (Definition 24); NaN where the block is zero.
        effective: d_eff = ‖H‖_*/‖H‖₂ (Definition 57); NaN where the block is zero.
    """

    rank: NDArray[np.int64]
    stable_rank: Array
    effective: Array


@dataclass(frozen=True)
class InteractionRanks:
    """Ranks of every sample's blocks, and of their mean over samples.

    Attributes:
        names: the n points, in topological order; the last is out.
        bound: bound on the rank of a sample's GN block, (n, n): the least cut to out, and the rank of ∇²L.
        mean_bound: bound on that of the mean, (n, n): B times as much, or the block's size.
        per_sample: by part (``"full"`` or ``"gn"``), (n, n, B).
        mean: by part, (n, n).
    """

    names: tuple[str, ...]
    bound: NDArray[np.int64]
    mean_bound: NDArray[np.int64]
    per_sample: dict[str, Spectra]
    mean: dict[str, Spectra]

    def __str__(self) -> str:
        one, all_ = self.per_sample["gn"], self.mean
        rows = []
        for v, w in zip(*np.triu_indices(len(self.names)), strict=True):
            row = f"{self.names[v]}, {self.names[w]}", int(self.bound[v, w]), int(one.rank[v, w].max())
            of_mean = int(self.mean_bound[v, w]), int(all_["gn"].rank[v, w]), int(all_["full"].rank[v, w])
            rows.append((*row, *of_mean, float(all_["full"].stable_rank[v, w]), float(all_["full"].effective[v, w])))
        return table(["pair", "GN ≤", "GN", "mean GN ≤", "mean GN", "mean H", "D", "d_eff"], rows)


def interaction_ranks(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Names = None,
    verify: str = "gradient",
) -> InteractionRanks:
    """Ranks of the blocks between activations, beside what the graph alone proves (paper, Proposition 31, Remark 60).

    Proved is rank H_GN[v,w] ≤ min(cut v→out, cut w→out, rank ∇²L) for one sample, rank ∇²L being K − 1 at most for
    cross-entropy over K classes; the mean over B samples can have B times that. Always D ≤ d_eff ≤ √(rank · D).

    Remark 60 of the paper says D(v,w) ≤ min(d_u, K − 1) of the block as a whole. That follows for a sample's GN block.
    It is false for the mean over samples, whose rank may be larger, and for H with its tensor part, which no bottleneck
    bounds.

    Args:
        model, batch, loss, output, points, verify: as for :func:`dag_hesse.analyze`; out is added to the points.

    Returns:
        :class:`InteractionRanks`.

    Raises:
        MemoryBudgetError: the blocks of one point do not fit.
        BatchCouplingError: samples interact.
        DagHesseError: as :func:`dag_hesse.analyze`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        >>> batch = torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 1, 1])
        >>> found = dh.theory.interaction_ranks(net, batch, points=["0"])
        >>> int(found.bound[0, 0]), int(found.per_sample["gn"].rank[0, 0].max()), int(found.mean["gn"].rank[0, 0])
        (1, 1, 4)
    """
    scene = pose(model, batch, loss=loss, output=output, points=points, verify=verify, tensor_part=True)
    structure = analyze_structure(scene.graph)
    samples, dims = scene.problem.groups, [point.dim for point in scene.points]
    _check_room(scene, dims, samples)
    count = len(dims)
    found = {part: _Table.empty((count, count, samples)) for part in _PARTS}
    mean = {part: _Table.empty((count, count, 1)) for part in _PARTS}
    for v, w, part, block in _blocks(scene):
        found[part].enter(v, w, block)
        mean[part].enter(v, w, block.mean(0, keepdim=True))
    whole = np.minimum(structure.rank_bound * samples, np.minimum.outer(dims, dims))
    return InteractionRanks(
        scene.names,
        structure.rank_bound,
        whole,
        {part: Spectra(each.rank, each.stable, each.effective) for part, each in found.items()},
        {part: Spectra(m.rank[..., 0], m.stable[..., 0], m.effective[..., 0]) for part, m in mean.items()},
    )


def _check_room(scene: Scene, dims: list[int], samples: int) -> None:
    need = 4 * samples * max(dims) * sum(dims) * scene.problem.dtype.itemsize
    if need > available_memory(scene.problem.device) // 2:
        raise MemoryBudgetError(
            f"the blocks of one point need {human(need)}: take fewer samples, or points of fewer dimensions."
        )


def _blocks(scene: Scene) -> Iterator[tuple[int, int, str, Tensor]]:
    """(v, w, part, blocks (B, d_v, d_w)) for v ≤ w."""
    for w in range(len(scene.points)):
        for v, parts in exact_blocks(scene.problem, w, tuple(range(w + 1))).items():
            for part, x in (("full", parts.full), ("gn", parts.gn)):
                if x is not None:
                    yield v, w, part, x.permute(1, 2, 0)


@dataclass
class _Table:
    """Ranks as they are found."""

    rank: NDArray[np.int64]
    stable: Array
    effective: Array

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> _Table:
        return cls(np.zeros(shape, dtype=np.int64), np.full(shape, np.nan), np.full(shape, np.nan))

    def enter(self, v: int, w: int, blocks: Tensor) -> None:
        values = torch.linalg.svdvals(blocks.double()).cpu().numpy()  # (blocks, min(d_v, d_w))
        top = values.max(axis=1)
        floor = _ROUNDING * max(blocks.shape[1:]) * torch.finfo(blocks.dtype).eps * top
        with np.errstate(divide="ignore", invalid="ignore"):
            stable, effective = (values**2).sum(1) / top**2, values.sum(1) / top
        for a, b in {(v, w), (w, v)}:
            self.rank[a, b] = (values > floor[:, None]).sum(1)
            self.stable[a, b], self.effective[a, b] = stable, effective
