"""Frobenius norms from Rademacher probes: E‖H z‖² = ‖H‖_F², with the GN norm as control variate where it is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dag_hesse.estimate.norms import Array, NormTable
from dag_hesse.estimate.products import Products
from dag_hesse.plan import Source
from dag_hesse.sweep import Problem, Request


def rademacher(problem: Problem, source: int, probes: int, generator: torch.Generator) -> Tensor:
    """Random signs (probes, groups, dim), drawn on the CPU so that every device sees the same."""
    shape = (probes, problem.groups, problem.dim(source))
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device="cpu")
    return (2 * signs - 1).to(dtype=problem.dtype, device=problem.device)


def _squares(x: Tensor | None, probes: int, groups: int) -> Array:
    return np.zeros((probes, groups)) if x is None else x.double().pow(2).sum(-1).cpu().numpy()


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

    def __init__(self, products: Products, source: Source, generator: torch.Generator) -> None:
        self.products, self.problem = products, products.problem
        self.source, self.generator = source, generator
        self.samples: dict[str, dict[int, list[Array]]] = {
            p: {v: [] for v in source.reads} for p in ("full", "gn", "tensor")
        }
        self.start: dict[int, Tensor] = {}  # per read point, left vectors (probes, groups, d_v) for the spectral norm

    @property
    def count(self) -> int:
        """Probes so far."""
        first = self.samples["full"][self.source.reads[0]]
        return sum(len(part) for part in first)

    def request(self, probes: int) -> Request:
        """Fresh probes for this source."""
        point = self.source.point
        return Request({point: rademacher(self.problem, point, probes, self.generator)}, self.source.reads)

    def extend(self, probes: int, progress: Callable[[int], None] | None = None) -> None:
        """Sweep ``probes`` more."""
        groups = self.problem.groups
        for v, parts in self.products.parts([self.request(probes)], progress)[0].items():
            full = parts.full
            for part, data in (("full", full), ("gn", parts.gn), ("tensor", parts.tensor)):
                self.samples[part][v].append(_squares(data, probes, groups))
            if full is not None and v not in self.start:
                self.start[v] = full

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
