"""The form of a sweep: what a compiled program or a recorded graph of launches is made for, and held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dag_hesse.sweep import engine
from dag_hesse.sweep.embed import reader
from dag_hesse.sweep.engine import Adjoint
from dag_hesse.sweep.linearize import Linearization


class Form(NamedTuple):
    """Which nodes are seeded and read, which parts, how many probes.

    ``seeds`` are nodes and shapes; ``parts`` is None where adjoints are seeded (a pullback); adjoints are read as
    vectors of an ``embedding``, or whole.
    """

    seeds: tuple[tuple[int, tuple[int, ...]], ...]
    reads: frozenset[int]
    parts: str | None
    embedding: str | None

    @staticmethod
    def of(seeds: Mapping[int, Tensor], reads: Iterable[int], parts: str | None, embedding: str | None) -> Form:
        """The form of a sweep with these ``seeds``."""
        return Form(tuple((k, tuple(x.shape)) for k, x in seeds.items()), frozenset(reads), parts, embedding)


def by_engine(lin: Linearization, form: Form, seeds: Mapping[int, Tensor]) -> dict[int, Adjoint]:
    """The sweep, call by call."""
    read = engine.whole if form.embedding is None else reader(lin.graph, form.embedding)
    if form.parts is not None:
        return engine.sweep(lin, seeds, form.reads, form.parts, read)
    found = engine.pullback(lin, seeds, form.reads, read)
    return {k: Adjoint(x, gn=True, tensor=False) for k, x in found.items()}


def disagreement(found: Mapping[int, Adjoint], expected: Mapping[int, Adjoint]) -> tuple[int, float] | None:
    """A node whose adjoint is off by more than rounding explains, and by how much of it; None if there is none."""
    largest = max((float(one.data.norm()) for one in expected.values()), default=0.0)
    for k, one in expected.items():
        off, size = float((found[k].data - one.data).norm()), float(one.data.norm())
        tolerance = torch.finfo(one.data.dtype).eps ** 0.5
        if not off <= tolerance * max(size, tolerance * largest):
            return k, off / max(size, 1e-300)
    return None
