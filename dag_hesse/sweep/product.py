"""One sweep, however its linearization runs it: call by call, recorded, or as a compiled program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from dag_hesse.sweep.compiled import Compiled
from dag_hesse.sweep.engine import Adjoint
from dag_hesse.sweep.form import Form, by_engine
from dag_hesse.sweep.linearize import Linearization
from dag_hesse.sweep.replay import Replayed

AnyLinearization = Linearization | Compiled


def sweep(
    lin: AnyLinearization,
    seeds: Mapping[int, Tensor],
    reads: Iterable[int],
    parts: str,
    embedding: str | None = None,
) -> dict[int, Adjoint]:
    """As :func:`dag_hesse.sweep.engine.sweep`.

    ``embedding``: what vectors adjoints are read as (:mod:`dag_hesse.sweep.embed`); None: as they are.
    """
    return _answer(lin, Form.of(seeds, reads, parts, embedding), seeds)


def pullback(
    lin: AnyLinearization, given: Mapping[int, Tensor], reads: Iterable[int], embedding: str | None = None
) -> dict[int, Tensor]:
    """As :func:`dag_hesse.sweep.engine.pullback`."""
    found = _answer(lin, Form.of(given, reads, None, embedding), given)
    return {k: adjoint.data for k, adjoint in found.items()}


def _answer(lin: AnyLinearization, form: Form, seeds: Mapping[int, Tensor]) -> dict[int, Adjoint]:
    return lin.run(form, seeds) if isinstance(lin, Compiled | Replayed) else by_engine(lin, form, seeds)
