"""Blocks that are not stored: each product sweeps the model."""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.storage.cores import Pair
from dag_hesse.storage.source import Source


class Live:
    """Products with the blocks of ``pairs`` (v ≤ w), from a source that may have become stale."""

    def __init__(self, source: Source, pairs: list[Pair], made_by: str) -> None:
        self.source, self.pairs, self.made_by = source, pairs, made_by

    def among(self, points: list[int]) -> Live:
        """Those between some points; numbers of points stay the problem's."""
        return Live(self.source, [p for p in self.pairs if p[0] in points and p[1] in points], self.made_by)

    def block(self, v: int, w: int, z: Tensor) -> Tensor:
        """H[v, w] z, (k, groups, d_v)."""
        self._check()
        return self.source.blocks(w, z, (v,))[0]

    def products(self, z: dict[int, Tensor]) -> dict[int, Tensor]:
        """Per point v, Σ_w H[v, w] z_w over the live pairs: a sweep a vector and point w."""
        self._check()
        sums: dict[int, Tensor] = {}
        for w, x in z.items():
            reads = tuple(sorted({b if a == w else a for a, b in self.pairs if w in (a, b)}))
            if reads:
                for v, y in zip(reads, self.source.blocks(w, x, reads), strict=True):
                    sums[v] = torch.add(sums[v], y) if v in sums else y
        return sums

    def _check(self) -> None:
        self.source.problem.check(self.made_by, "make the matrix again, its live blocks sweep the model.")
