"""The definitions, with tensors of all scores.

S = scale · q k + bias    P = softmax(S)    A = factor · drop ∘ P    out = A v
E = factor · drop ∘ (G vᵀ)    C = E − δ    Y = P ∘ C    (the adjoint of S is Y)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dag_hesse.kernels.arena import Arena
from dag_hesse.kernels.attention.operands import Adjoint, Bound, Operands, Residual

ALL = slice(None)


def _scores(a: Operands, q: Tensor, k: Tensor) -> Tensor:
    """scale · q k, 0 where a score is hidden, (…, N, S, T)."""
    found = a.scale * (q @ k)
    return found if a.hidden is None else found.masked_fill(_side(a, a.hidden), 0)


def _side(a: Operands, x: Tensor) -> Tensor:
    return x.expand(*a.lead, a.q.shape[1], a.k.shape[2]).flatten(0, 1)


def _dropped(a: Operands, x: Tensor) -> Tensor:
    return a.factor * (x if a.drop is None else x * _side(a, a.drop))


def _weights(a: Operands) -> Tensor:
    scores = _scores(a, a.q, a.k)
    if a.bias is None:
        return torch.softmax(scores, -1)
    bias = _side(a, a.bias)
    p = torch.softmax(scores + bias, -1)
    return p.masked_fill(bias.amax(-1, keepdim=True) == -torch.inf, 0) if a.blank else p


def value(arena: Arena, a: Operands) -> Tensor:
    """out, (N, S, E)."""
    return _dropped(a, _weights(a)) @ a.v


def _of_scores(a: Operands, tangents: Mapping[int, Tensor]) -> Tensor:
    """Ṡ."""
    terms = [_scores(a, tangents[0], a.k)] if 0 in tangents else []
    terms += [_scores(a, a.q, tangents[1])] if 1 in tangents else []
    return sum(terms, a.q.new_zeros(()))


def tangent(arena: Arena, a: Operands, out: Tensor, tangents: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """ȯut, (P, N, S, E), and μ, (P, N, S, 1), for tangents of q, k and v by slot; ``out`` is the value."""
    p = _weights(a)
    moved = _of_scores(a, tangents).expand(len(next(iter(tangents.values()))), *p.shape)
    mu = (p * moved).sum(-1, keepdim=True)
    found = _dropped(a, p * (moved - mu)) @ a.v
    return (found + _dropped(a, p) @ tangents[2] if 2 in tangents else found), mu


def adjoints(arena: Arena, a: Operands, out: Tensor, bound: Bound | None, of: Adjoint) -> dict[int, Tensor]:
    """Per slot, the sum of what goes back; ``bound`` is of the loss, where there is a residual."""
    first = {} if of.abar is None else _transposed(a, out, of.abar, of.slots)
    second = {} if of.residual is None or bound is None else _second(a, bound, of.residual, of.slots)
    found = {}
    for slot in of.slots:
        x = first.get(slot)
        if x is not None and slot in second:
            x[of.rows] += second[slot]
        x = second[slot] if x is None else x
        found[slot] = of.into[slot].add_(x) if slot in of.into else x
    return found


def _transposed(a: Operands, out: Tensor, abar: Tensor, slots: Sequence[int]) -> dict[int, Tensor]:
    p = _weights(a)
    x = p * (_dropped(a, abar @ a.v.mT) - (abar * out).sum(-1, keepdim=True))
    return _apart(a, {0: _ahead(a, x, a.k), 1: _behind(a, x, a.q), 2: _dropped(a, p).mT @ abar}, slots)


def _second(a: Operands, bound: Bound, residual: Residual, slots: Sequence[int]) -> dict[int, Tensor]:
    p, given = _weights(a), residual.tangents
    c = _dropped(a, bound.lam @ a.v.mT) - bound.delta
    moved = _of_scores(a, given) - residual.mu
    x = moved * c - residual.delta
    if 2 in given:
        x = x + _dropped(a, bound.lam @ given[2].mT)
    q, k = _ahead(a, p * x, a.k), _behind(a, p * x, a.q)
    if 1 in given:
        q = q + _ahead(a, p * c, given[1])
    if 0 in given:
        k = k + _behind(a, p * c, given[0])
    return _apart(a, {0: q, 1: k, 2: _dropped(a, p * moved).mT @ bound.lam}, slots)


def _ahead(a: Operands, x: Tensor, k: Tensor) -> Tensor:
    """What an adjoint of the scores makes at q."""
    x = x if a.hidden is None else x.masked_fill(_side(a, a.hidden), 0)
    return a.scale * (x @ k.mT)


def _behind(a: Operands, x: Tensor, q: Tensor) -> Tensor:
    """And at k."""
    x = x if a.hidden is None else x.masked_fill(_side(a, a.hidden), 0)
    return a.scale * (q.mT @ x)


def _apart(a: Operands, found: dict[int, Tensor], slots: Sequence[int]) -> dict[int, Tensor]:
    return {slot: found[slot] for slot in slots}
