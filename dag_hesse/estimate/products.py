"""Block products H z: by sweeps alone, or with the GN part from the Gram route's factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dag_hesse.estimate.gram import GramBlocks, GramFactors
from dag_hesse.sweep import Parts, Problem, Request


@dataclass(frozen=True)
class Products:
    """What estimators draw on. With ``factors``, sweeps carry the T channel alone: a third less work a probe."""

    problem: Problem
    factors: GramFactors | GramBlocks | None = None

    def room(self) -> int:
        """Bytes that products may take at once, half of what sweeps may use; the same on all ranks."""
        mine, ranks = self.problem.budget.sweeps // 2, self.problem.ranks
        return mine if ranks is None else ranks.least("room for products", mine)

    def parts(
        self, requests: Sequence[Request], progress: Callable[[int], None] | None = None
    ) -> list[dict[int, Parts]]:
        """GN and T apart, per request and read point."""
        if self.factors is None:
            return self.problem.run(requests, progress=progress)
        found = self.problem.run(requests, parts="tensor", progress=progress)
        return [
            {v: Parts(self.factors.product(v, source, z), parts.tensor) for v, parts in each.items()}
            for request, each in zip(requests, found, strict=True)
            for source, z in request.z.items()  # estimators probe one point at a time
        ]

    def whole(
        self, requests: Sequence[Request], progress: Callable[[int], None] | None = None
    ) -> list[dict[int, Tensor | None]]:
        """GN + T, per request and read point; None where nothing arrives."""
        if self.factors is None:
            found = self.problem.run(requests, parts="full", progress=progress)
        else:
            found = self.parts(requests, progress)
        return [{v: parts.full for v, parts in each.items()} for each in found]
