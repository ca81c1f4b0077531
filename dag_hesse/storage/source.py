"""Where stored blocks come from: products of one part of H with vectors, all points at once or one point at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dag_hesse.estimate.exact import identity
from dag_hesse.measure import available_memory
from dag_hesse.sweep import Problem, Request

Progress = Callable[[str, int, int], None]  # (stage, sweeps done, sweeps expected)
_HOLDOUTS = 1 << 32  # number of the first probe that is kept for checking


@dataclass
class Source:
    """One part of a problem's Hessian.

    Attributes:
        problem: what is swept.
        part: ``"full"``, ``"gn"`` or ``"tensor"``.
        alive: n×n, False where the part is proved zero.
        seed: of all probes.
        progress: told of sweeps.
    """

    problem: Problem
    part: str
    alive: NDArray[np.bool_]
    seed: int
    progress: Progress | None = None

    @property
    def dims(self) -> list[int]:
        """d_v, per group."""
        return [self.problem.dim(k) for k in range(len(self.problem.points))]

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored: half-precision models are stored in float32, for factorizations need it."""
        return stored_dtype(self.problem)

    @property
    def groups(self) -> int:
        """Blocks that a pair has."""
        return self.problem.groups

    def gaussian(self, number: int) -> list[Tensor]:
        """Probe ``number`` at all points, (1, groups, d_v) each: the same however probes are cut into chunks."""
        key = np.random.SeedSequence([self.seed % (1 << 64), number]).generate_state(
            1
        )  # PyTorch uses 32 bits of a seed
        generator = torch.Generator().manual_seed(int(key[0]))
        shapes = [(1, self.groups, dim) for dim in self.dims]
        rows = [torch.randn(shape, generator=generator, dtype=self.dtype, device="cpu") for shape in shapes]
        return [row.to(self.problem.device) for row in rows]

    def probes(self, start: int, count: int, *, holdout: bool = False) -> list[Tensor]:
        """Probes ``start`` to ``start + count`` at all points, (count, groups, d_v) each."""
        first = start + (_HOLDOUTS if holdout else 0)
        drawn = [self.gaussian(first + k) for k in range(count)]
        return [torch.cat(rows) for rows in zip(*drawn, strict=True)]

    def products(self, z: list[Tensor]) -> list[Tensor]:
        """Per point v, Σ_w H[v, w] z_w of vectors (k, groups, d_w) at all points: one sweep a vector."""
        every = tuple(range(len(z)))
        return self._read(Request(dict(enumerate(z)), every), len(z[0]))

    def blocks(self, w: int, z: Tensor, reads: tuple[int, ...]) -> list[Tensor]:
        """Per read point v, H[v, w] z of vectors (k, groups, d_w): one sweep a vector."""
        return self._read(Request({w: z}, reads), len(z))

    def unit_vectors(self, w: int) -> Tensor:
        """(d_w, groups, d_w)."""
        return identity(self.problem, w).to(self.dtype)

    def _read(self, request: Request, count: int) -> list[Tensor]:
        found = self.problem.run([request], parts=self.part)[0]
        rows = []
        for v in request.reads:
            x = found[v].full if v in found else None  # of a part alone, that is the part
            shape = (count, self.groups, self.problem.dim(v))
            blank = torch.zeros(shape, dtype=self.dtype, device=self.problem.device) if x is None else x
            rows.append(blank.to(self.dtype))
        return rows

    def room(self) -> int:
        """Bytes that are free, where there are least of several ranks: what is done depends on it."""
        free, ranks = available_memory(self.problem.device), self.problem.ranks
        return free if ranks is None else ranks.least("memory", free)

    def tell(self, stage: str, done: int, expected: int) -> None:
        """Report how far it has come."""
        if self.progress is not None:
            self.progress(stage, done, expected)

    def pairs(self) -> list[tuple[int, int]]:
        """Pairs v ≤ w that are not proved zero."""
        return [(int(v), int(w)) for v, w in zip(*np.nonzero(np.triu(self.alive)), strict=True)]


def stored_dtype(problem: Problem) -> torch.dtype:
    """Floating-point type of a stored matrix."""
    return torch.promote_types(problem.dtype, torch.float32)
