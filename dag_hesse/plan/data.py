"""The plan as data: what is swept from where, and how every pair's norms are obtained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dag_hesse._structure import Structure
from dag_hesse.plan.cost import Cost

# Golub–Kahan steps that a pair's spectral norm takes, as a rule; each is a product and its transpose
SPECTRAL_STEPS = 5
Methods = NDArray[np.object_]  # n×n of Method


class Method(str, Enum):
    """How a norm is obtained, from the most exact on."""

    ZERO = "zero"
    GRAM = "gram"
    EXACT = "exact"
    PROBES = "probes"
    SKIPPED = "skipped"  # not asked for

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Source:
    """Sweeps from one point: ``probes`` of them, read at ``reads`` (point indices), exact or by random probes."""

    point: int
    method: Method
    probes: int
    reads: tuple[int, ...]
    flops: float
    bytes: float


@dataclass(frozen=True)
class Plan:
    """The plan. ``method`` (n×n) is how the full block's norm is obtained, ``gn_method`` that of its GN part.

    ``rank_method`` is how the stable rank is.

    ``gram_columns`` are the pullbacks of the Gram route (0: not taken), ``spectral_cost`` what spectral norms of
    sampled pairs take as a rule. ``chunk`` is the number of probes swept together, ``peak_bytes`` the predicted memory
    of one such sweep and of what is kept between sweeps, but for the linearization.
    """

    structure: Structure
    method: Methods
    gn_method: Methods
    tensor_method: Methods
    rank_method: Methods
    sources: tuple[Source, ...]
    gram_columns: int
    gram_cost: Cost
    spectral_cost: Cost
    chunk: int
    peak_bytes: int

    @property
    def flops(self) -> float:
        """Predicted FLOPs of all sweeps."""
        return self.gram_cost.flops + self.spectral_cost.flops + sum(source.flops for source in self.sources)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        names = self.structure.names
        rows = [{**asdict(s), "point": names[s.point], "reads": [names[k] for k in s.reads]} for s in self.sources]
        return {
            "points": list(names),
            "method": self.method.astype(str).tolist(),
            "gn_method": self.gn_method.astype(str).tolist(),
            "sources": [{**row, "method": str(row["method"])} for row in rows],
            "gram_columns": self.gram_columns,
            "spectral_flops": self.spectral_cost.flops,
            "flops": self.flops,
            "chunk": self.chunk,
            "peak_bytes": self.peak_bytes,
        }

    def __str__(self) -> str:
        names = self.structure.names
        width = max(len(name) for name in names)
        lines = [
            f"plan: {self.flops / 1e9:.2f} GFLOP, {self.chunk} probes a sweep, {self.peak_bytes / 2**20:.0f} MiB peak"
        ]
        if self.gram_columns:
            lines.append(f"gram: {self.gram_columns} pullbacks, {self.gram_cost.flops / 1e9:.2f} GFLOP, all points")
        for s in self.sources:
            reads = ", ".join(names[k] for k in s.reads)
            lines.append(
                f"{names[s.point]:<{width}}  {s.method:<6} {s.probes:>6} probes  {s.flops / 1e9:>9.2f} GFLOP"
                f"  reads {reads}"
            )
        if self.spectral_cost.flops:
            lines.append(
                f"spectral norms: about {2 * SPECTRAL_STEPS} products a sampled pair, "
                f"{self.spectral_cost.flops / 1e9:.2f} GFLOP"
            )
        return "\n".join(lines)
