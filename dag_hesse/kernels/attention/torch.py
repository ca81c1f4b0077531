"""By products of chunks: scores are computed anew, as many at a time as the caches hold; none outlive their chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.attention.operands import ALL, Adjoint, Bound, Chunk, Operands, Residual, chunks
from dag_hesse.kernels.machine import machine

# Up to so many scores, a value is made of whole matrices: it is the model's own to the bit then, as the gates of a ReLU
# behind it are.
_WHOLE = 1 << 22


def _largest(a: Operands) -> int:
    return machine(a.q.device).scores


class _Scores:
    """One chunk's operands, and its weights P."""

    def __init__(self, a: Operands, chunk: Chunk) -> None:
        self.a, self.chunk = a, chunk
        self.q, self.k, self.v = self.queries(a.q), self.columns(a.k), self.keys(a.v)
        self.hidden = None if a.hidden is None else chunk.side(a.hidden)
        self.drop = None if a.drop is None else chunk.side(a.drop)
        scores = torch.bmm(self.q, self.k) if a.scale == 1 else torch.bmm(self.q, self.k).mul_(a.scale)
        if a.bias is not None:
            bias = chunk.side(a.bias)
            scores = self.masked(scores).add_(bias)
        self.p = torch.softmax(scores, -1)
        if a.blank and a.bias is not None:
            self.p.masked_fill_(bias.amax(-1, keepdim=True) == -torch.inf, 0)

    def queries(self, x: Tensor) -> Tensor:
        """Its part of (N, S, …)."""
        return self.chunk.matrices(x, self.a.lead, self.chunk.queries)

    def keys(self, x: Tensor) -> Tensor:
        """Its part of (N, T, …)."""
        return self.chunk.matrices(x, self.a.lead, self.chunk.keys)

    def columns(self, x: Tensor) -> Tensor:
        """Its part of (N, D, T)."""
        return self.chunk.matrices(x, self.a.lead, ALL, self.chunk.keys)

    def masked(self, x: Tensor) -> Tensor:
        """0 where scores are hidden."""
        return x if self.hidden is None else x.masked_fill_(self.hidden, 0)

    def dropped(self, x: Tensor) -> Tensor:
        """factor · drop ∘ x, in place."""
        x = x if self.a.factor == 1 else x.mul_(self.a.factor)
        return x if self.drop is None else x.mul_(self.drop)

    def weights(self) -> Tensor:
        """A."""
        return self.dropped(self.p.clone()) if self.a.factor != 1 or self.drop is not None else self.p

    def moved(self, tangents: Mapping[int, Tensor], row: int) -> Tensor | None:
        """Ṡ of one probe."""
        found = None
        if 0 in tangents:
            found = torch.bmm(self.queries(tangents[0][row]), self.k)
        if 1 in tangents:
            k = self.columns(tangents[1][row])
            found = torch.bmm(self.q, k) if found is None else found.baddbmm_(self.q, k)
        if found is None:
            return None
        return self.masked(found if self.a.scale == 1 else found.mul_(self.a.scale))


def value(arena: Arena, a: Operands) -> Tensor:
    found = arena.in_order(a.q, (*a.q.shape[:2], a.v.shape[2]), a.q)  # what goes back to q's axes needs no copy then
    matrix = a.q.shape[1] * a.k.shape[2]
    a = a._replace(spans=None)
    for chunk in chunks(a, max(_largest(a), min(matrix, _WHOLE))):
        at = _Scores(a, chunk)
        _put(found, a, chunk, chunk.queries, torch.bmm(at.dropped(at.p), at.v))
    return found


def tangent(arena: Arena, a: Operands, out: Tensor, tangents: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    rows = len(next(iter(tangents.values())))
    found, mus = arena.in_order(a.q, (rows, *out.shape), out), a.q.new_zeros(rows, *out.shape[:2], 1)
    for chunk in chunks(a, _largest(a)):
        at = _Scores(a, chunk)
        weights = at.weights() if 2 in tangents else None
        for row in range(rows):
            part, moved = None, at.moved(tangents, row)
            if moved is not None:
                mu = moved.mul_(at.p).sum(-1, keepdim=True)
                _put(mus[row], a, chunk, chunk.queries, mu)
                part = torch.bmm(at.dropped(moved.addcmul_(at.p, mu, value=-1)), at.v)
            if weights is not None:
                v = at.keys(tangents[2][row])
                part = torch.bmm(weights, v) if part is None else part.baddbmm_(weights, v)
            assert part is not None
            _put(found[row], a, chunk, chunk.queries, part)
    return found, mus


def adjoints(arena: Arena, a: Operands, out: Tensor, bound: Bound | None, of: Adjoint) -> dict[int, Tensor]:
    count, abar, found = of.height, of.abar, of.places(arena, a)
    for slot in of.slots:
        if slot not in of.into:
            found[slot].zero_()
    of_row = {row: n for n, row in enumerate(range(count)[of.rows])} if of.residual is not None else {}
    overlaps = None if abar is None else (abar * out).sum(-1, keepdim=True)
    for chunk in chunks(a, _largest(a)):
        at = _Adjoints(_Scores(a, chunk), bound if of_row else None)
        for row in range(count):
            one = None if abar is None or overlaps is None else (at.of.queries(abar[row]), at.of.queries(overlaps[row]))
            terms = at.terms(one, of.residual if row in of_row else None, of_row.get(row, 0), of.slots)
            for slot, x in terms.items():
                _add(found[slot][row], a, chunk, slot, x)
    return found


class _Adjoints:
    """One chunk's weights, and what of its second-order terms all probes share: G, C and Y."""

    def __init__(self, of: _Scores, bound: Bound | None) -> None:
        self.of, self.weights = of, of.weights()
        if bound is not None:
            self.lam = of.queries(bound.lam)
            self.c = of.dropped(torch.bmm(self.lam, of.v.mT)).sub_(of.queries(bound.delta))
            self.y = of.masked(of.p * self.c)

    def terms(
        self, one: tuple[Tensor, Tensor] | None, residual: Residual | None, probe: int, slots: Sequence[int]
    ) -> dict[int, Tensor]:
        """What comes of an adjoint and its overlap with ``out``, and of a probe's residual, per slot."""
        of, tangents = self.of, {} if residual is None else residual.tangents
        moved = None if residual is None else self._moved(residual, probe)
        found: dict[int, Tensor] = {}
        if 0 in slots or 1 in slots:
            x = self._of_scores(one, residual, probe, moved)
            if 0 in slots:
                found[0] = torch.bmm(x, of.k.mT)
                if 1 in tangents:
                    found[0].baddbmm_(self.y, of.columns(tangents[1][probe]).mT)
            if 1 in slots:
                found[1] = torch.bmm(of.q.mT, x)
                if 0 in tangents:
                    found[1].baddbmm_(of.queries(tangents[0][probe]).mT, self.y)
        values = self._of_values(one, moved) if 2 in slots else None
        if values is not None:
            found[2] = values
        return found if of.a.scale == 1 else {s: x if s == 2 else x.mul_(of.a.scale) for s, x in found.items()}

    def _moved(self, residual: Residual, probe: int) -> Tensor | None:
        """Ṡ − μ; None where the scores do not move."""
        moved = self.of.moved(residual.tangents, probe)
        return None if moved is None else moved.sub_(self.of.queries(residual.mu[probe]))

    def _of_scores(
        self, one: tuple[Tensor, Tensor] | None, residual: Residual | None, probe: int, moved: Tensor | None
    ) -> Tensor:
        """P ∘ (factor · drop ∘ (ā vᵀ + G v̇ᵀ) − ⟨ā, out⟩ − δ̇ + (Ṡ − μ) ∘ C)."""
        of, x = self.of, None
        if one is not None:
            x = torch.bmm(one[0], of.v.mT)
        if residual is not None and 2 in residual.tangents:
            v = of.keys(residual.tangents[2][probe]).mT
            x = torch.bmm(self.lam, v) if x is None else x.baddbmm_(self.lam, v)
        x = torch.zeros_like(of.p) if x is None else of.dropped(x)
        if one is not None:
            x.sub_(one[1])
        if residual is not None:
            x.sub_(of.queries(residual.delta[probe]))
        if moved is not None:
            x.addcmul_(moved, self.c)
        return of.masked(x.mul_(of.p))

    def _of_values(self, one: tuple[Tensor, Tensor] | None, moved: Tensor | None) -> Tensor | None:
        """Aᵀ ā + (A ∘ (Ṡ − μ))ᵀ G; what ``moved`` holds is used up."""
        found = None if one is None else torch.bmm(self.weights.mT, one[0])
        if moved is not None:
            moved.mul_(self.weights)
            found = torch.bmm(moved.mT, self.lam) if found is None else found.baddbmm_(moved.mT, self.lam)
        return found


def _put(x: Tensor, a: Operands, chunk: Chunk, rows: slice, part: Tensor) -> None:
    """Write a chunk's part of (N, rows, …)."""
    chunk.of(x, a.lead, rows).copy_(part.view(*chunk.lead, *part.shape[1:]))


def _add(x: Tensor, a: Operands, chunk: Chunk, slot: int, part: Tensor) -> None:
    """Add a chunk's part of a slot's adjoint."""
    rows, columns = ((chunk.queries, ALL), (ALL, chunk.keys), (chunk.keys, ALL))[slot]
    chunk.of(x, a.lead, rows, columns).add_(part.view(*chunk.lead, *part.shape[1:]))
