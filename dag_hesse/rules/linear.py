"""Rules of ops that are linear in their inputs jointly: the op itself moves tangents, its transpose cotangents."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, execute
from dag_hesse.kernels.pool import empty_as
from dag_hesse.rules.base import Call, Linearized, Rule, Tangents, no_pairs

Transpose = Callable[[Call, Tensor, int], Tensor]
Forward = Callable[[Call, tuple[Tensor, ...]], Tensor]


def _run(call: Call, inputs: tuple[Tensor, ...]) -> Tensor:
    return execute(call.node, inputs)


@final
class _Linear(Linearized):
    def __init__(self, call: Call, forward: Forward, transpose: Transpose | None) -> None:
        # Shapes and strides are all that is needed of the active inputs.
        kept = tuple(shell(v) if on else v for v, on in zip(call.values, call.active, strict=True))
        self.call = Call(call.node, kept, shell(call.out), call.active)
        self.forward, self.transpose = forward, transpose

    def jvp(self, tangents: Tangents) -> Tensor:
        slots = sorted(tangents)
        still = [
            torch.zeros_like(value) if value.is_floating_point() and slot not in tangents else value
            for slot, value in enumerate(self.call.values)
        ]

        def apply(*given: Tensor) -> Tensor:
            inputs = list(still)
            for slot, xdot in zip(slots, given, strict=True):
                inputs[slot] = xdot
            return self.forward(self.call, tuple(inputs))

        return _each_probe(apply, *(tangents[slot] for slot in slots))

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        if self.transpose is None:
            whole = empty_as(cotangent, self.call.values[0]).zero_()
            self._part(whole).copy_(cotangent)
            return whole
        transpose = self.transpose
        return _each_probe(lambda g: transpose(self.call, g, slot), cotangent)

    def add_vjp(self, cotangent: Tensor, slot: int, into: Tensor) -> bool:
        if self.transpose is None:
            self._part(into).add_(cotangent)
        return self.transpose is None

    def _part(self, whole: Tensor) -> Tensor:
        return _each_probe(lambda x: self.forward(self.call, (x,)), whole)


def shell(x: Tensor) -> Tensor:
    """A tensor like ``x``, strides and all, without memory."""
    return _shell(x.shape, x.stride(), x.dtype, x.device)


@lru_cache(maxsize=1 << 12)  # they cannot be written to, and every linearization asks for the same ones
def _shell(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    like = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    like.untyped_storage().resize_(0)
    return like


def _each_probe(apply: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """``apply`` for all probes at once; a single one is spared the transformation."""
    if len(given[0]) == 1:
        return apply(*(x[0] for x in given)).unsqueeze(0)
    return torch.vmap(apply)(*given)


def linear(transpose: Transpose, forward: Forward = _run, kind: Kind = Kind.STRUCTURAL) -> Rule:
    """An op linear in its floating-point inputs jointly; ``transpose(call, cotangent, slot)`` is its adjoint.

    Both maps are written for one probe; they must not read the values of active inputs, only their shapes.
    """
    return Rule(kind, lambda call: _Linear(call, forward, transpose), no_pairs)


def part() -> Rule:
    """An op whose result is a view of some elements of its only input: cotangents are written to that view."""
    return Rule(Kind.STRUCTURAL, lambda call: _Linear(call, _run, None), no_pairs)


__all__ = ["linear", "part", "shell"]
