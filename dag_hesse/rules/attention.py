"""Attention, softmax(q kᵀ) v, as one node: no product of it keeps a tensor of scores (design §3, rules)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Node
from dag_hesse.ir.node import fill as fill_in
from dag_hesse.kernels import attention
from dag_hesse.kernels.arena import Arena, has_values
from dag_hesse.kernels.attention import Adjoint, Bound, Operands, adjoints, tangent, value
from dag_hesse.rules.base import Buffers, Call, Linearized, Pairs, Residual, Rule, Samples, Shapes, Tangents

_Q, _K, _V = range(3)
_PAIRS = frozenset((i, j) for i in range(3) for j in range(3) if (i, j) != (_V, _V))  # the result is linear in v


def _operands(node: Node, values: Sequence[Tensor]) -> Operands:
    """The op's arguments with its masks made one bias, in the shape of the scores."""
    (q, k, v, bias, hidden, drop, lead, scale, fill, factor, safe), _ = fill_in(node, values)
    shape = [1] * (2 - len(lead)) + list(lead)
    bias, hidden, drop = (None if x is None else x[(None,) * (4 - x.ndim)] for x in (bias, hidden, drop))
    if hidden is not None:
        start = q.new_zeros(()) if bias is None else bias
        bias = torch.where(hidden, torch.full_like(start, fill), start)
    if fill == -torch.inf:
        hidden = None  # the weights are 0 there
    return Operands(q, k, v, (shape[0], shape[1]), scale, factor, bias, hidden, drop, *_seen(bias, q, k, safe))


def _seen(bias: Tensor | None, q: Tensor, k: Tensor, safe: bool) -> tuple[tuple[tuple[int, int], ...] | None, bool]:
    """First and last key of every query, where there are queries that do not meet all; and whether some meet none."""
    if bias is None or not has_values(bias):
        return None, bias is not None and safe
    seen = (bias > -torch.inf).expand(*bias.shape[:2], q.shape[1], k.shape[2])
    blank = safe and not bool(seen.any(-1).all())
    seen, keys = seen.any(0).any(0), k.shape[2]
    if not keys or bool(seen[:, 0].all() & seen[:, -1].all()):
        return None, blank
    numbers = torch.arange(keys, device=q.device)
    first, last = torch.where(seen, numbers, keys).amin(-1), torch.where(seen, numbers, -1).amax(-1)
    return tuple(zip(first.tolist(), last.tolist(), strict=True)), blank


@final
class _Attention(Linearized):
    def __init__(self, call: Call) -> None:
        self.of, self.out = _operands(call.node, call.values), call.value
        self.arena, self.curved = call.arena, call.curved
        self.bound: Bound | None = None

    def bind(self, lam: Tensor | None, slots: Sequence[int], into: Buffers) -> dict[int, Tensor]:
        if lam is not None and self.curved:
            self.bound = Bound(lam[0], (lam[0] * self.out).sum(-1, keepdim=True))
        return super().bind(lam, slots, into)

    def push(self, tangents: Tangents, onward: bool, curved: Sequence[int]) -> tuple[Tensor | None, Residual]:
        met = self.bound is not None and any((i, j) in _PAIRS for i in curved for j in tangents)
        if not (onward or met):
            return None, None
        moved, mu = tangent(self.arena, self.of, self.out, tangents)
        if not met or self.bound is None:
            return moved, None
        residual = attention.Residual(dict(tangents), mu, (self.bound.lam * moved).sum(-1, keepdim=True))
        return moved if onward else None, residual

    def pull(
        self, abar: Tensor | None, residual: Residual, rows: slice, slots: Sequence[int], into: Buffers
    ) -> dict[int, Tensor]:
        back = Adjoint(abar, residual, rows, slots, into)
        return adjoints(self.arena, self.of, self.out, self.bound, back) if slots else {}


def _pairs(node: Node) -> Pairs:
    return _PAIRS


def _run(node: Node, inputs: Sequence[Tensor], arena: Arena) -> Tensor:
    return value(arena, _operands(node, inputs))


def _flops(node: Node, shapes: Shapes) -> int:
    """Of the two products."""
    (count, queries, width), keys = shapes[_Q], shapes[_K][-1]
    return 2 * count * queries * keys * (width + shapes[_V][-1])


TABLE: dict[str, Rule] = {
    "dag_hesse.attention.default": Rule(Kind.ROWWISE, _Attention, _pairs, Samples.UNKNOWN, run=_run, flops=_flops),
}

__all__ = ["TABLE"]
