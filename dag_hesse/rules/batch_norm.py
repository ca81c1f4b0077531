"""BatchNorm with statistics as inputs: y = γ (x − m) r + β per image channel, r = (v + ε)^-½."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, Node, Ref
from dag_hesse.kernels.arena import has_values
from dag_hesse.kernels.batch_affine import adjoint, sums, tangent
from dag_hesse.kernels.elementwise import Coefficient
from dag_hesse.rules.base import Buffers, Call, Linearized, Pairs, Residual, Rule, Samples, Tangents
from dag_hesse.rules.elementwise import elementwise

_ARGUMENTS = "xγβmv"
_TINY = 1e-15  # λ is not found again from γ r λ where γ r is smaller


def _active(node: Node, active: Sequence[bool]) -> dict[str, int]:
    """Input slots of the arguments that a point reaches (``active``, per slot)."""
    slots = {name: arg.slot for name, arg in zip(_ARGUMENTS, node.args, strict=False) if isinstance(arg, Ref)}
    return {name: slot for name, slot in slots.items() if active[slot]}


def has_fixed_statistics(node: Node, active: Sequence[bool]) -> bool:
    """Whether x and γ are active, maybe β, and the statistics are not."""
    return {"x", "γ"} <= set(_active(node, active)) <= {"x", "γ", "β"}


def _partials(c: Call) -> tuple[dict[int, Coefficient], dict[tuple[int, int], Coefficient]]:
    shape = _channels(c, 1)
    weight = None if c.argument(1) is None else c.argument(1).reshape(shape)
    mean, var = c.argument(3).reshape(shape), c.argument(4).reshape(shape)
    r = torch.rsqrt(var + c.argument(5))
    gain = r if weight is None else r * weight
    slots = _active(c.node, c.active)
    off = c.values[0] - mean if {"γ", "v"} & set(slots) else None
    dgain = -0.5 * gain * r * r  # ∂(γ r)/∂v
    first: dict[str, Any] = {"x": gain, "β": 1.0, "m": -gain}
    second: dict[str, Any] = {"xγ": r, "xv": dgain, "mγ": -r, "mv": -dgain}
    if off is not None:
        first |= {"γ": off * r, "v": off * dgain}
        second |= {"γv": -0.5 * off * r**3, "vv": -1.5 * off * dgain * r * r}
    found = {(slots[p[0]], slots[p[1]]): h for p, h in second.items() if p[0] in slots and p[1] in slots}
    return {slot: first[name] for name, slot in slots.items()}, found | {(j, i): h for (i, j), h in found.items()}


def _pairs(node: Node) -> Pairs:
    slots = _active(node, [True] * len(node.inputs))
    curved = (("x", "γ"), ("x", "v"), ("m", "γ"), ("m", "v"), ("γ", "v"), ("v", "v"))
    found = {(slots[i], slots[j]) for i, j in curved if i in slots and j in slots}
    return frozenset(found | {(j, i) for i, j in found})


def _channels(c: Call, slot: int) -> tuple[int, ...]:
    """How an input lies against the output: what is not x has one number per image channel."""
    return tuple(c.shape(0)) if slot == 0 else (1, -1, *(1,) * (c.values[0].ndim - 2))


@final
class _FixedStatistics(Linearized):
    """:func:`has_fixed_statistics`: x and λ are kept as they are, for the rest is per image channel.

    The transpose μ = γ r λ is kept in λ's place, as what comes before keeps it too; unless a γ is zero.
    """

    def __init__(self, call: Call) -> None:
        self.slots, self.x, self.eps = _active(call.node, call.active), call.values[0], float(call.argument(5))
        self.mean, self.var = call.argument(3), call.argument(4)
        self.r = torch.rsqrt(self.var + self.eps)
        self.gamma = call.argument(1)
        self.gain = self.r * self.gamma
        self.curved, self.arena = call.curved, call.arena
        self.lam: Tensor | None = None  # or μ; λ r is factor times that

    def _sums(self, g: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        return sums(self.arena, g, x, mean, self.r, self.var, self.eps)

    def bind(self, lam: Tensor | None, slots: Sequence[int], into: Buffers) -> dict[int, Tensor]:
        found, x = super().bind(lam, slots, into), self.slots["x"]
        if lam is not None and self.curved:
            self.lam, self.factor = lam, self.r
            usual = has_values(self.gain) and float(self.gain.abs().min()) > _TINY
            if x in found and (usual or self.gain.is_meta):
                self.lam, self.factor = found[x], 1 / self.gamma
        return found

    def push(self, tangents: Tangents, onward: bool, curved: Sequence[int]) -> tuple[Tensor | None, Residual]:
        xdot, scale, shift = (tangents.get(self.slots.get(name, -1)) for name in "xγβ")
        moved = self._move(xdot, scale, shift) if onward else None
        share = turned = None
        if self.lam is not None and scale is not None and self.slots["x"] in curved:
            share = scale * self.factor
        if self.lam is not None and xdot is not None and self.slots["γ"] in curved:
            turned = self._sums(self.lam, xdot, torch.zeros_like(self.mean))[0] * (self.factor / self.r)
        return moved, None if share is None and turned is None else (share, turned)

    def _move(self, xdot: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        if scale is not None:
            scale = scale * self.r
            shift = -self.mean * scale if shift is None else shift - self.mean * scale
        return tangent(self.arena, self.gain, xdot, self.x, scale, shift)

    def pull(
        self, abar: Tensor | None, residual: Residual, rows: slice, slots: Sequence[int], into: Buffers
    ) -> dict[int, Tensor]:
        share, turned = residual or (None, None)
        x, scale, shift = self.slots["x"], self.slots["γ"], self.slots.get("β")
        found: dict[int, Tensor] = {}
        if x in slots and not (abar is None and share is None):
            lam = None if share is None else self.lam
            found[x] = adjoint(self.arena, self.gain, abar, lam, share, rows)
        if abar is not None and {scale, shift} & set(slots):
            of_scale, of_shift = self._sums(abar, self.x[None], self.mean)
            if turned is not None:
                of_scale[rows] += turned
            found |= {k: data for k, data in ((scale, of_scale), (shift, of_shift)) if k is not None and k in slots}
        elif turned is not None and scale in slots:
            found[scale] = turned
        return found


_ELEMENTWISE = elementwise(Kind.SMOOTH, _partials, _pairs, _channels, samples=Samples.AFFINE)


def _linearize(call: Call) -> Linearized:
    usual = has_fixed_statistics(call.node, call.active)
    return _FixedStatistics(call) if usual else _ELEMENTWISE.linearize(call)


TABLE: dict[str, Rule] = {"dag_hesse.batch_affine.default": replace(_ELEMENTWISE, linearize=_linearize)}

__all__ = ["TABLE", "has_fixed_statistics"]
