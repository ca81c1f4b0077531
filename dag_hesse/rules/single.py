"""Rules of ops of one input, written as maps: its tangent, its transpose, and its second-order term."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import final

from torch import Tensor

from dag_hesse.kernels.arena import plus_term
from dag_hesse.rules.base import Buffers, Call, Linearized, Residual, Tangents


class Single(Linearized):
    """A call of one input. A linear one moves and transposes; others keep something of λ, and have a second term."""

    def __init__(self, call: Call) -> None:
        self.curved, self.arena, self.bound = call.curved, call.arena, False

    @abstractmethod
    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        """ẏ, and what the second-order term takes of ẋ (it is asked for once λ is ``bound``)."""

    @abstractmethod
    def transpose(self, g: Tensor) -> Tensor:
        """Jᵀ ȳ."""

    def keep(self, lam: Tensor, mu: Tensor | None) -> None:
        """Keep what the second-order term takes of λ, (*output), and its transpose μ, where that is known already."""

    def second(self, residual: Residual, into: Tensor | None) -> Tensor:
        """The second-order term, or ``into`` with it added."""
        raise NotImplementedError(f"{type(self).__name__} saves a residual and has no second-order term")

    def adjoint(self, abar: Tensor | None, residual: Residual, rows: slice, into: Tensor | None) -> Tensor:
        """Jᵀ ȳ, where there is one, with the second-order term in its ``rows``; it may be added to ``into``."""
        if abar is None:
            return self.second(residual, None)
        return plus_term(self.transpose(abar), abar, rows, partial(self.second, residual))

    def bind(self, lam: Tensor | None, slots: Sequence[int], into: Buffers) -> dict[int, Tensor]:
        if lam is None:
            return {}
        mu = self.transpose(lam) if slots else None
        if self.curved:
            self.keep(lam[0], None if mu is None else mu[0])
            self.bound = True
        return {} if mu is None else {0: mu}

    def push(self, tangents: Tangents, onward: bool, curved: Sequence[int]) -> tuple[Tensor | None, Residual]:
        moved, residual = self.move(tangents[0])
        return moved if onward else None, residual if curved and self.bound else None

    def pull(
        self, abar: Tensor | None, residual: Residual, rows: slice, slots: Sequence[int], into: Buffers
    ) -> dict[int, Tensor]:
        if not slots:
            return {}
        if residual is None and abar is not None:
            return {0: self.transpose(abar)}
        return {0: self.adjoint(abar, residual, rows, into.get(0))}


@final
class Constant(Single):
    """Constant wherever it has a derivative: a sign, a softmax of one number."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.shape, self.out_shape = call.shape(), call.value.shape

    def move(self, x: Tensor) -> tuple[Tensor, Residual]:
        return x.new_zeros(len(x), *self.out_shape), None

    def transpose(self, g: Tensor) -> Tensor:
        return g.new_zeros(len(g), *self.shape)


__all__ = ["Constant", "Single"]
