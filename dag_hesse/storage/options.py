"""What a stored matrix is to be: how exact, how large, how wide; checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from dag_hesse.budget import bytes_of
from dag_hesse.errors import MemoryBudgetError, OptionError, choose, integer
from dag_hesse.options import checked_options

PARTS = ("full", "gn", "tensor")
RESTS = ("drop", "live")


@dataclass(frozen=True)
class Wanted:
    """Checked options of :meth:`dag_hesse.BlockMatrix.from_model`; ``error`` is None where ``rank`` decides alone."""

    error: float | None
    rank: int | None
    memory: int | None
    band: int | str | None
    eps: float | None
    rest: str
    seed: int


@checked_options()
def wanted(
    *,
    error: Any = None,
    rank: Any = None,
    memory: Any = None,
    band: Any = None,
    eps: Any = None,
    rest: Any = "drop",
    seed: Any = 0,
) -> Wanted:
    """Check the options.

    Raises:
        OptionError: one has a type or a value that it may not have, or two contradict each other.
    """
    choose("rest", rest, RESTS)
    if isinstance(band, str):
        choose("band", band, ("error",))
    elif band is not None:
        band = integer("band", band, 0, "0 keeps the diagonal blocks alone")
    if band is not None and eps is not None:
        raise OptionError(f"band={band!r} and eps={eps!r} both say how wide the band is: pass one of them.")
    if error is None and rank is None:
        error = 0.01
    return Wanted(
        None if error is None else _share("error", error, least=0.0),
        None if rank is None else integer("rank", rank, 1),
        None if memory is None else bytes_of(memory),
        band,
        None if eps is None else _share("eps", eps),
        rest,
        integer("seed", seed),
    )


def check_room(dims: Sequence[int], pairs: int, number: int, memory: int | None) -> None:
    """Whether one direction a point fits, with a core of one number a pair; ``number``: bytes of one, in all groups.

    Raises:
        MemoryBudgetError: it does not.
    """
    least = number * (sum(d for d in dims if d > 1) + pairs)
    if memory is not None and memory < least:
        raise MemoryBudgetError(
            f"memory={memory} bytes, but one direction a point, which the diagonal blocks need, takes {least}: raise "
            "memory=, or take fewer or smaller points."
        )


def _share(name: str, value: Any, least: float | None = None) -> float:
    good = isinstance(value, Real) and not isinstance(value, bool) and value < 1  # type: ignore[operator]
    if not good or not (value > 0 or value == least):
        low = "from 0" if least is not None else "above 0"
        raise OptionError(f"{name}={value!r}; expected a relative size {low} and below 1.")
    return float(value)
