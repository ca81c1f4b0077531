"""Numbers of a stored matrix: an orthonormal basis per point, and a small core per pair of points.

H[v, w] ≈ Q_v C[v, w] Q_wᵀ. A basis serves all blocks of its point, so that a block costs r_v × r_w numbers beyond it; a
point whose basis is None keeps its coordinates, and a block between two such points is dense. As bases are orthonormal,
a core has its block's norm and singular values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]  # of points, the smaller first


@dataclass
class Cores:
    """Bases and cores of n points.

    Attributes:
        dims: d_v, per group.
        groups: blocks that a pair has (one a sample where samples do not interact in ``"joint"`` mode, else one).
        bases: per point (groups, d_v, r_v) with orthonormal columns, or None for the unit vectors.
        cores: per stored pair v ≤ w (groups, r_v, r_w); symmetric to the bit where v = w.
    """

    dims: list[int]
    groups: int
    bases: list[Tensor | None]
    cores: dict[Pair, Tensor]

    def rank(self, v: int) -> int:
        """Columns of a point's basis."""
        basis = self.bases[v]
        return self.dims[v] if basis is None else basis.shape[-1]

    def core(self, v: int, w: int) -> Tensor:
        """(groups, r_v, r_w) of a stored pair in any order."""
        return self.cores[v, w] if v <= w else self.cores[w, v].mT

    def compress(self, v: int, z: Tensor) -> Tensor:
        """Q_vᵀ z: vectors (k, groups, d_v) of a point -> (groups, k, r_v)."""
        basis, rows = self.bases[v], z.transpose(0, 1)
        return rows if basis is None else rows @ basis

    def expand(self, v: int, t: Tensor) -> Tensor:
        """Q_v t: (groups, k, r_v) -> (k, groups, d_v)."""
        basis = self.bases[v]
        return (t if basis is None else t @ basis.mT).transpose(0, 1)

    def products(self, z: list[Tensor]) -> list[Tensor]:
        """Per point, products (k, groups, d_v) with vectors (k, groups, d_v): every basis is read twice, in all."""
        short = [self.compress(v, x) for v, x in enumerate(z)]
        sums: list[Tensor | None] = [None] * len(z)

        def add(v: int, term: Tensor) -> None:
            sums[v] = term if (have := sums[v]) is None else have + term

        for (v, w), core in self.cores.items():
            add(v, short[w] @ core.mT)
            if v != w:
                add(w, short[v] @ core)
        pairs = zip(z, sums, strict=True)
        return [torch.zeros_like(x) if t is None else self.expand(v, t) for v, (x, t) in enumerate(pairs)]

    def dense(self, v: int, w: int) -> Tensor:
        """The block (groups, d_v, d_w); symmetric to the bit where v = w."""
        if v > w:
            return self.dense(w, v).mT
        block, left, right = self.cores[v, w], self.bases[v], self.bases[w]
        block = block if left is None else left @ block
        block = block if right is None else block @ right.mT
        return symmetric(block) if v == w and left is not None else block

    def diagonal(self, v: int) -> Tensor | None:
        """Diagonal elements of the block [v, v], (groups, d_v); None where it is zero."""
        core, basis = self.cores.get((v, v)), self.bases[v]
        if core is None or basis is None:
            return None if core is None else core.diagonal(dim1=-2, dim2=-1)
        return ((basis @ core) * basis).sum(-1)

    def norm(self, v: int, w: int) -> float:
        """‖H[v, w]‖_F of a stored pair, over all groups."""
        return float(self.core(v, w).double().norm())

    @property
    def bytes(self) -> int:
        """Of all bases and cores."""
        return sum(map(size, [*(b for b in self.bases if b is not None), *self.cores.values()]))


def size(x: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return x.numel() * x.element_size()


def symmetric(x: Tensor) -> Tensor:
    """(X + Xᵀ)/2: equal to its transpose to the bit, as sums commute."""
    return (x + x.mT) / 2
