"""Rules of ops that are linear in their inputs jointly: the op itself moves tangents, its transpose adjoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import final

import torch
from torch import Tensor

from dag_hesse.ir.node import Kind, execute
from dag_hesse.kernels.arena import is_traced
from dag_hesse.rules.base import NOTHING, Buffers, Call, Linearized, Moves, Residual, Rule, Samples, Tangents, no_pairs

Transpose = Callable[[Call, Tensor, int], Tensor]
Forward = Callable[[Call, tuple[Tensor, ...]], Tensor]


def _run(call: Call, inputs: tuple[Tensor, ...]) -> Tensor:
    return execute(call.node, inputs)


@final
class _Linear(Linearized):
    def __init__(self, call: Call, forward: Forward, transpose: Transpose | None) -> None:
        # Shapes and strides are all that is needed of the active inputs.
        kept = tuple(shell(v) if on else v for v, on in zip(call.values, call.active, strict=True))
        self.call = replace(call, values=kept, value=shell(call.value))
        self.forward, self.transpose = forward, transpose

    def push(self, tangents: Tangents, onward: bool, curved: Sequence[int]) -> tuple[Tensor | None, Residual]:
        return self._move(tangents) if onward else None, None

    def _move(self, tangents: Tangents) -> Tensor:
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

        return _each_probe(apply, self.call.value.shape, *(tangents[slot] for slot in slots))

    def pull(
        self, abar: Tensor | None, residual: Residual, rows: slice, slots: Sequence[int], into: Buffers
    ) -> dict[int, Tensor]:
        assert abar is not None
        transpose = self.transpose
        if transpose is not None:
            to = self.call.shape
            return {slot: _each_probe(lambda g, k=slot: transpose(self.call, g, k), to(slot), abar) for slot in slots}
        return {slot: self._whole(abar, into.get(slot)) for slot in slots}

    def _whole(self, abar: Tensor, into: Tensor | None) -> Tensor:
        """A selection's adjoint as the whole's, or added to that."""
        if into is not None:
            self._selected(into).add_(abar)
            return into
        whole = self.call.arena.empty_as(abar, self.call.values[0]).zero_()
        self._selected(whole).copy_(abar)
        return whole

    def _selected(self, whole: Tensor) -> Tensor:
        return _each_probe(lambda x: self.forward(self.call, (x,)), self.call.value.shape, whole)


def shell(x: Tensor) -> Tensor:
    """A tensor like ``x``, strides and all, without memory; ``x`` itself while a program is traced."""
    return x if is_traced(x) else _shell(x.shape, x.stride(), x.dtype, x.device)


@lru_cache(maxsize=1 << 12)  # they cannot be written to, and every linearization asks for the same ones
def _shell(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    like = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    like.untyped_storage().resize_(0)
    return like


def _each_probe(apply: Callable[..., Tensor], shape: torch.Size, *given: Tensor) -> Tensor:
    """``apply``, which gives a ``shape``, for all probes at once; a single one is spared the transformation.

    Where the transformation mistakes an op for another shape (of index_select it drops an index without axes), probes
    go one by one.
    """
    if len(given[0]) == 1:
        return apply(*(x[0] for x in given)).unsqueeze(0)
    found = torch.vmap(apply)(*given)
    return found if found.shape[1:] == shape else torch.stack([apply(*one) for one in zip(*given, strict=True)])


def _as_it_is(call: Call) -> Call:
    return call


def linear(
    transpose: Transpose,
    samples: Samples,
    forward: Forward = _run,
    *,
    moves: Moves = NOTHING,
    kind: Kind = Kind.STRUCTURAL,
    prepare: Callable[[Call], Call] = _as_it_is,
) -> Rule:
    """An op linear in its floating-point inputs jointly; ``transpose(call, abar, slot)`` is its transpose.

    Both maps are written for one probe; they must not look at the values of active inputs, only their shapes.
    ``prepare(call)`` is the same call, written so that its products look at no values on the host.
    """
    made = partial(_Linear, forward=forward, transpose=transpose)
    return Rule(kind, lambda call: made(prepare(call)), no_pairs, samples, moves=moves, linear=kind is Kind.STRUCTURAL)


def selection(samples: Samples, moves: Moves = Moves.VIEW) -> Rule:
    """An op whose result is a view of some elements of its only input: adjoints are written to that view."""
    return Rule(Kind.STRUCTURAL, lambda call: _Linear(call, _run, None), no_pairs, samples, moves=moves, linear=True)


__all__ = ["linear", "selection", "shell"]
