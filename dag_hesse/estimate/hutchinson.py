"""Frobenius norms from Rademacher probes: E‖H z‖² = ‖H‖_F², with the GN norm as control variate where it is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dag_hesse.estimate.norms import PARTS, Array, NormTable, leading
from dag_hesse.estimate.products import Products
from dag_hesse.kernels import probe
from dag_hesse.plan import Source
from dag_hesse.sweep import Parts, Problem, Request
from dag_hesse.sweep.runner import pieces


def rademacher(problem: Problem, source: int, key: int, first: int, probes: int) -> Tensor:
    """Random signs (probes, groups, dim) of a key, of the probes from number ``first`` on; on every device the same."""
    like = torch.empty(0, dtype=problem.dtype, device=problem.device)
    return probe.signs(problem.arena, key, first, (probes, problem.groups, problem.dim(source)), like)


def _squares(problem: Problem, parts: Parts, probes: int) -> dict[str, Array]:
    """Squared norms (probes, groups) of the full product and its parts."""
    norms = {name: np.zeros((probes, problem.groups)) for name in PARTS}
    given = {name: x for name, x in (("gn", parts.gn), ("tensor", parts.tensor)) if x is not None}
    if given:
        found = probe.squares(problem.arena, tuple(given.values())).cpu().numpy()
        norms |= dict(zip((*given, "full"), found if len(given) > 1 else (found[0], found[0]), strict=True))
    return norms


def _controlled(samples: Array, control: Array, known: Array) -> Array:
    """Subtract the part of each sample that a control of known mean explains (per group).

    What is left is spread by the degree of freedom that the fitted slope took, so that standard errors stay honest.
    """
    centered = control - control.mean(0)
    variance = (centered**2).sum(0)
    slope = np.where(variance > 0, (centered * samples).sum(0) / np.where(variance > 0, variance, 1.0), 0.0)
    rest = samples - slope * (control - known)
    mean, count = rest.mean(0), len(rest)
    return mean + (rest - mean) * (max(count - 1, 1) / max(count - 2, 1)) ** 0.5


class Sketch:
    """Products Y = H z of one source with its read points: norms are taken from them, spectra start from them."""

    def __init__(self, products: Products, source: Source, key: int) -> None:
        self.products, self.problem = products, products.problem
        self.source, self.key = source, key
        self.samples: dict[str, dict[int, list[Array]]] = {p: {v: [] for v in source.reads} for p in PARTS}
        self.start: dict[int, Tensor] = {}  # per read point, where its spectral norm starts: (groups, d_v)

    @property
    def count(self) -> int:
        """Probes so far."""
        first = self.samples["full"][self.source.reads[0]]
        return sum(len(part) for part in first)

    def request(self, probes: int) -> Request:
        """Probes for this source that it did not have yet."""
        point = self.source.point
        return Request({point: rademacher(self.problem, point, self.key, self.count, probes)}, self.source.reads)

    def extend(self, probes: int, progress: Callable[[int], None] | None = None) -> None:
        """Sweep ``probes`` more, as many at a time as their products have room."""
        most = max(1, self.products.room() // self._bytes())
        for piece in pieces(probes, most):
            self._sweep(piece.stop - piece.start, progress)

    def _bytes(self) -> int:
        """Of one probe's products: GN, T and their sum, and the directions that those are compared with."""
        problem = self.problem
        size = problem.dim(self.source.point) + 4 * sum(problem.dim(v) for v in self.source.reads)
        return size * problem.groups * problem.dtype.itemsize

    def _sweep(self, probes: int, progress: Callable[[int], None] | None) -> None:
        for v, parts in self.products.parts([self.request(probes)], progress)[0].items():
            for part, norms in _squares(self.problem, parts, probes).items():
                self.samples[part][v].append(norms)
            if (full := parts.full) is not None:
                before = self.start.get(v)
                self.start[v] = leading(full if before is None else torch.cat([before.unsqueeze(0), full]))

    def enter(self, table: NormTable, gn_known: dict[tuple[int, int], Array]) -> None:
        """Enter norms with their pseudo-values; ``gn_known`` holds exact ‖H_GN‖_F² per group."""
        w = self.source.point
        for v in self.source.reads:
            pair = (min(v, w), max(v, w))
            full, gn, tensor = (np.concatenate(self.samples[part][v]) for part in ("full", "gn", "tensor"))
            known = gn_known.get(pair)
            if known is not None:
                full = _controlled(full, gn, known)
            else:
                table.set_sampled("gn", pair, gn, w)
            table.set_sampled("full", pair, full, w)
            table.set_sampled("tensor", pair, tensor, w)
