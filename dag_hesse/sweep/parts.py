"""What is asked of sweeps, and what they give: probes at points, and their products with blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena


@dataclass(frozen=True)
class Request:
    """One set of probes: ``z`` (probes, groups, dim) per source point, read at points ``reads`` (indices)."""

    z: Mapping[int, Tensor]
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """Products of one source's probes with the blocks of one read point: (probes, groups, dim) each; None is zero."""

    gn: Tensor | None
    tensor: Tensor | None

    @property
    def full(self) -> Tensor | None:
        """GN + T."""
        if self.gn is None or self.tensor is None:
            return self.tensor if self.gn is None else self.gn
        return self.gn + self.tensor

    def plus(self, other: Parts) -> Parts:
        """Products of two batches that share their probes."""

        def part(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return b if a is None else a if b is None else a + b

        return Parts(part(self.gn, other.gn), part(self.tensor, other.tensor))

    def beside(self, other: Parts, mine: int, theirs: int) -> Parts:
        """Products of ``mine`` groups, then those of ``theirs``, which are another batch's or sample's."""

        def part(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            some = a if a is not None else b
            if some is None:
                return None
            a = some.new_zeros(some.shape[0], mine, some.shape[2]) if a is None else a
            b = some.new_zeros(some.shape[0], theirs, some.shape[2]) if b is None else b
            return torch.cat([a, b], dim=1)

        return Parts(part(self.gn, other.gn), part(self.tensor, other.tensor))


def in_a_row(arena: Arena, chunks: Sequence[Tensor | None], scale: float) -> Tensor | None:
    """Chunks of probes, one behind the other. Whether a part is zero is structural, so it is the same for all."""
    tensors = [chunk for chunk in chunks if chunk is not None]
    if not tensors:
        return None
    joined = tensors[0]
    if len(tensors) > 1:
        joined = torch.cat(tensors, out=arena.empty(joined, sum(map(len, tensors)), *joined.shape[1:]))
    return joined if scale == 1.0 else joined * scale
