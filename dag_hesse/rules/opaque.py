"""The fallback: autograd on one op alone, exact wherever the op can be differentiated twice in reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.func import vjp

from dag_hesse.ir.node import Kind, Node, execute
from dag_hesse.rules.base import Call, Linearized, Note, Pairs, Rule, Tangents, added


@final
class _Opaque(Linearized):
    def __init__(self, call: Call) -> None:
        self.call = call
        self.slots = [slot for slot, on in enumerate(call.active) if on]
        self.primals = tuple(call.values[slot] for slot in self.slots)
        self.lam: Tensor | None = None

    def _function(self, *primals: Tensor) -> Tensor:
        values = list(self.call.values)
        for slot, value in zip(self.slots, primals, strict=True):
            values[slot] = value
        return execute(self.call.node, values)

    def _pullback(self, cotangent: Tensor) -> tuple[Tensor, ...]:
        return vjp(self._function, *self.primals)[1](cotangent)

    def jvp(self, tangents: Tangents) -> Tensor:
        # The transpose of the (linear) pullback: reverse mode twice, as few rare ops have a forward mode.
        zero = torch.zeros_like(self.call.out)
        _, push = _on_tape(lambda: vjp(self._pullback, zero))
        return _each_probe(lambda *given: _on_tape(lambda: push(given))[0], self._full(tangents))

    def vjp(self, cotangent: Tensor, slot: int) -> Tensor:
        place = self.slots.index(slot)
        return _each_probe(lambda g: _on_tape(lambda: self._pullback(g))[place], [cotangent])

    def curve(self, lam: Tensor, pulled: Tangents) -> None:
        self.lam = lam

    def second(self, tangents: Tangents, note: Note, slot: int, into: Tensor | None = None) -> Tensor | None:
        if self.lam is None or not tangents:
            return None
        lam, place = self.lam, self.slots.index(slot)
        # T·λ is symmetric, so its product with ẋ is the gradient of ⟨pullback(λ), ẋ⟩.
        _, turn = _on_tape(lambda: vjp(lambda *p: vjp(self._function, *p)[1](lam), *self.primals))
        return added(_each_probe(lambda *given: _on_tape(lambda: turn(given))[place], self._full(tangents)), into)

    def _full(self, tangents: Tangents) -> list[Tensor]:
        probes = next(iter(tangents.values())).shape[0]
        return [
            tangents[slot] if slot in tangents else self.call.values[slot].new_zeros(probes, *self.call.shape(slot))
            for slot in self.slots
        ]


def _on_tape(fn: Callable[[], Any]) -> Any:
    with torch.enable_grad():
        return fn()


def _each_probe(fn: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
    return torch.stack([fn(*rows).detach() for rows in zip(*tensors, strict=True)])


def _all_pairs(node: Node) -> Pairs:
    slots = range(len(node.inputs))
    return frozenset((i, j) for i in slots for j in slots)


OPAQUE = Rule(Kind.OPAQUE, _Opaque, _all_pairs)
