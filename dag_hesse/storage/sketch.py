"""Bases by randomized range finding on sweeps (Halko, Martinsson and Tropp 2011): one sketch of all points at once.

Y = H Ω with Gaussian Ω at all points costs a sweep a column, whatever the number of points, and Y_v spans, nearly, the
range of the block row H[v, :]. d_v × d_w numbers are never formed. The sketch doubles until probes that were left out
say that the error is small enough. Two ways lead from it to cores:

- one pass, no further sweep: H ≈ Y (Ωᵀ Y)⁺ Yᵀ (Nyström; Nakatsukasa and Park 2023 where H is indefinite);
- two passes: Q_v from Y_v, then Q_vᵀ H[v, w] Q_w by a sweep for each direction of each point. It is more exact, and
  needs fewer directions where blocks have little in common.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dag_hesse.storage.cores import Cores
from dag_hesse.storage.draft import Draft, Holdouts, exact, from_factors, total, two_passes
from dag_hesse.storage.orthonormal import orthonormal
from dag_hesse.storage.source import Source

START = 16  # directions of the first sketch
OVER = 8  # more than asked for, where a rank is given
_SHARE = 0.7  # of the error that is allowed; the rest is for trimming


class Sketch:
    """Y = H Ω, a growing number of columns: per point (s, groups, d_v)."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.rows: list[list[Tensor]] = [[] for _ in source.dims]
        self.count = 0
        self.small = torch.zeros(source.groups, 0, 0, dtype=torch.float64, device=source.problem.device)

    def extend(self, count: int, expected: int) -> None:
        """Sweep until there are ``count`` columns; ``Ωᵀ Y`` grows by rows, so that Ω need not be kept."""
        while self.count < count:
            now = min(4 * self.source.problem.chunk, count - self.count)
            omega = self.source.probes(self.count, now)
            for rows, y in zip(self.rows, self.source.products(omega), strict=True):
                rows.append(y)
            strip = self._against(omega)  # (groups, now, count + now)
            whole = strip.new_zeros(strip.shape[0], strip.shape[2], strip.shape[2])
            whole[:, : self.count, : self.count] = self.small
            whole[:, self.count :], whole[:, :, self.count :] = strip, strip.mT
            self.small = whole
            self.count += now
            self.source.tell("sketch", self.count, expected)

    def _against(self, omega: list[Tensor]) -> Tensor:
        strips = []
        for number in range(len(self.rows[0])):
            # sums over millions of elements, in double precision
            terms = [
                z.transpose(0, 1).double() @ rows[number].permute(1, 2, 0).double()
                for z, rows in zip(omega, self.rows, strict=True)
            ]
            strips.append(torch.stack(terms).sum(0))
        return torch.cat(strips, dim=-1)

    def stacked(self, v: int) -> Tensor:
        """Y_v as rows (groups, s, d_v)."""
        self.rows[v] = [torch.cat(self.rows[v])]
        return self.rows[v][0].transpose(0, 1)

    def weights(self) -> tuple[Tensor, Tensor]:
        """W (groups, r, s) and signs (groups, r) such that H ≈ (W Y)ᵀ Σ (W Y)."""
        values, vectors = torch.linalg.eigh((self.small + self.small.mT) / 2)
        order = values.abs().argsort(dim=-1, descending=True)
        values = values.gather(-1, order)
        vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
        floor = values.abs().amax() * torch.finfo(self.source.dtype).eps * self.count
        if bool((values < -floor).any()):  # where signs mix, the last directions are noise over little
            values, vectors = values[..., : max(1, 2 * self.count // 3)], vectors[..., : max(1, 2 * self.count // 3)]
        kept = (values.abs() > floor).any(0)
        values, vectors = values[..., kept], vectors[..., kept]
        scale = torch.where(values.abs() > floor, values.abs().clamp_min(floor).rsqrt(), 0.0)
        signs = torch.where(values < 0, -1.0, 1.0)
        return (vectors * scale.unsqueeze(-2)).mT.to(self.source.dtype), signs.to(self.source.dtype)

    def one_pass(self, holdouts: Holdouts) -> list[float]:
        """Row errors of H ≈ Y (ΩᵀY)⁺ Yᵀ."""
        w, signs = self.weights()
        alive, probes = self.source.alive, holdouts.probes
        ys = [self.stacked(v) for v in range(len(self.rows))]
        # W (Y_w z_w): (groups, r, p) per point
        short = [signs.unsqueeze(-1) * (w @ (y @ z.permute(1, 2, 0))) for y, z in zip(ys, probes, strict=True)]
        found = []
        for v, y in enumerate(ys):
            near = [short[u] for u in range(len(ys)) if alive[v, u]]
            t = torch.stack(near).sum(0) if near else torch.zeros_like(short[0])
            found.append(((w.mT @ t).mT @ y).transpose(0, 1))
        return holdouts.errors(found)

    def bases(self) -> list[Tensor | None]:
        """Per point an orthonormal basis (groups, d_v, s) of Y_v; None where unit vectors are not many more."""
        return [
            None if small(dim, self.count) else orthonormal(self.stacked(v).mT)[0]
            for v, dim in enumerate(self.source.dims)
        ]

    def left_out(self, bases: list[Tensor | None], holdouts: Holdouts) -> list[float]:
        """Per point √2 ‖(I − Q_v Q_vᵀ) H[v, :]‖_F, estimated: what two passes would be off by, at most."""
        empty = Cores(self.source.dims, self.source.groups, bases, {})
        held = [empty.expand(v, empty.compress(v, y)) for v, y in enumerate(holdouts.products)]
        return [2**0.5 * x for x in holdouts.errors(held)]


def small(dim: int, count: int) -> bool:
    """Whether a point keeps its coordinates beside a sketch of so many columns: then its blocks are exact."""
    return dim <= 2 * count


def sketched(source: Source, error: float | None, rank: int | None, most: int) -> Draft:
    """Sketch until the relative error is below ``error``, or there are ``rank`` or ``most`` directions."""
    sketch, holdouts = Sketch(source), Holdouts(source)
    most = max(1, min(most, max(source.dims)))
    count = min(most, START if rank is None else rank + OVER)
    allowed = 0.0 if error is None else _SHARE * error * holdouts.size
    history: list[tuple[int, float]] = []
    while True:
        sketch.extend(count, count)
        last = count >= most or rank is not None
        once = total(sketch.one_pass(holdouts))
        history.append((count, once / holdouts.size if holdouts.size else 0.0))
        if once <= allowed:
            return _finished(from_weights(source, sketch), "one pass", holdouts, history)
        bases = sketch.bases()
        twice = total(sketch.left_out(bases, holdouts))
        if twice <= allowed or (last and (twice / 2**0.5 < 0.8 * once or once >= holdouts.size)):
            del sketch
            return _finished(two_passes(source, bases), "two passes", holdouts, history)
        if last:
            return _finished(from_weights(source, sketch), "one pass", holdouts, history)
        del bases  # as large as the sketch, which grows now
        count = min(most, 2 * count)


def from_weights(source: Source, sketch: Sketch) -> Cores:
    """Bases and cores of the one-pass approximation; the sketch is used up."""
    w, signs = sketch.weights()
    factors = []
    for v in range(len(sketch.rows)):
        factors.append(w @ sketch.stacked(v))
        sketch.rows[v] = []
    return from_factors(source, factors, signs)


def _finished(cores: Cores, route: str, holdouts: Holdouts, history: list[tuple[int, float]]) -> Draft:
    if all(basis is None for basis in cores.bases) and route == "two passes":
        return exact(cores)
    rows = holdouts.errors(cores.products(holdouts.probes))
    if history and holdouts.size:
        history[-1] = (history[-1][0], total(rows) / holdouts.size)
    return Draft(cores, route, rows, holdouts.size, history)
