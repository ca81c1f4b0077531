"""Σ aᵀ g by an implementation's product of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dag_hesse.kernels.arena import Arena

Product = Callable[[Arena, Tensor, Tensor, Tensor | None], Tensor]
Terms = Sequence[tuple[Tensor, Tensor]]


def outer_by(product: Product) -> Callable[[Arena, Terms, bool, Tensor | None], Tensor]:
    """As :func:`dag_hesse.kernels.contraction.reference.outer`."""

    def outer(arena: Arena, terms: Terms, turned: bool, into: Tensor | None) -> Tensor:
        for g, a in terms:
            if turned:
                into = product(arena, g.mT, a, None if into is None else into.mT).mT
            else:
                into = product(arena, a.mT, g, into)
        assert into is not None
        return into

    return outer


def refuse_outer_by(
    refuse_product: Callable[[Tensor, Tensor, Tensor | None], str | None],
) -> Callable[[Terms, bool, Tensor | None], str | None]:
    """Why one of the products is refused."""

    def refuse_outer(terms: Terms, turned: bool, into: Tensor | None) -> str | None:
        whole = None if into is None else into.mT if turned else into
        pairs = [(g.mT, a) if turned else (a.mT, g) for g, a in terms]
        return next((why for pair in pairs if (why := refuse_product(*pair, whole))), None)

    return refuse_outer
