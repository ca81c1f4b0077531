"""The maps of a bound call, one at a time: what :meth:`push` and :meth:`pull` do together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dag_hesse.rules import Linearized
from dag_hesse.rules.base import ALL


def jvp(lin: Linearized, tangents: Mapping[int, Tensor]) -> Tensor:
    """Σ_i D_i ẋ_i."""
    moved, residual = lin.push(tangents, True, ())
    assert moved is not None
    assert residual is None  # nobody asked for it
    return moved


def vjp(lin: Linearized, abar: Tensor, slot: int) -> Tensor:
    """D_slotᵀ ā."""
    return lin.pull(abar, None, ALL, [slot], {})[slot]


def second(lin: Linearized, tangents: Mapping[int, Tensor], slot: int) -> Tensor | None:
    """Σ_j (T[slot, j]·λ) ẋ_j, with the λ that was bound; None where the call knows it to be zero."""
    moved, residual = lin.push(tangents, False, [slot])
    assert moved is None
    return None if residual is None else lin.pull(None, residual, ALL, [slot], {}).get(slot)


def bind(lin: Linearized, lam: Tensor, slots: Sequence[int] = ()) -> dict[int, Tensor]:
    """Bind λ, (*output), and return its transposes."""
    return {slot: x[0] for slot, x in lin.bind(lam.unsqueeze(0), slots, {}).items()}
