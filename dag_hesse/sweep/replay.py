"""Sweeps on a GPU as CUDA graphs: the launches of a sweep are recorded once, and then replayed without Python.

A sweep reads no values, so its launches are the same for all seeds of a form. The first sweep of a form runs call by
call (it compiles kernels and chooses algorithms), the second is recorded and held against another one, and from the
third on it is replayed (design §7).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dag_hesse.errors import out_of_memory
from dag_hesse.sweep.engine import Adjoint
from dag_hesse.sweep.form import Form, by_engine, disagreement
from dag_hesse.sweep.linearize import Linearization

_LOG = logging.getLogger("dag_hesse")
SWITCH = "DAG_HESSE_REPLAY"  # "0" turns recording off
_MOST = 32  # forms that a linearization records

Results = dict[int, Adjoint]
Record = Callable[[Callable[[], Results], Any], tuple[Callable[[], None], Results, int]]
refused: dict[str, int] = {}  # reasons why sweeps were not recorded, and how often


def cuda_graph(run: Callable[[], Results], pool: Any) -> tuple[Callable[[], None], Results, int]:
    """The launches of ``run`` as a graph, where it leaves its results, and by how many bytes ``pool`` grew for it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        before = torch.cuda.memory_reserved()  # on entry, what is cached elsewhere was given back
        results = run()
        size = torch.cuda.memory_reserved() - before
    return graph.replay, results, size


@dataclass
class Recorded:
    """A sweep whose launches were recorded: it reads ``seeds`` and leaves its ``results`` where they are."""

    seeds: dict[int, Tensor]
    replay: Callable[[], None]
    results: Results

    def run(self, seeds: Mapping[int, Tensor]) -> Results:
        """The sweep of other seeds; results in memory of their own."""
        for k, x in self.seeds.items():
            x.copy_(seeds[k])
        self.replay()
        return {k: Adjoint(one.data.clone(), one.gn, one.tensor) for k, one in self.results.items()}


class Replayed(Linearization):
    """A linearization whose sweeps are recorded, and replayed from the third of a form on.

    ``record`` makes a recording; recordings share the memory of one pool, as one runs after the other. They hold it for
    as long as the linearization lives: ``holds(bytes)`` says whether there is room for so much more.
    """

    record: Record = staticmethod(cuda_graph)

    def __init__(self, *args: Any, holds: Callable[[int], bool] = lambda size: True, **options: Any) -> None:
        super().__init__(*args, **options)
        self._holds = holds
        self._known: dict[Form, Recorded | None] = {}  # None: it ran once
        self._pool: Any = None
        self._off = os.environ.get(SWITCH) == "0"

    def run(self, form: Form, seeds: Mapping[int, Tensor]) -> Results:
        """The sweep, replayed if it can be."""
        known = self._known.get(form)
        if known is not None:
            return known.run(seeds)
        seeds = {k: x.contiguous() for k, x in seeds.items()}
        found = by_engine(self, form, seeds)
        if form in self._known and not self._off:
            self._known[form] = made = self._made(form, seeds, found)
            self._off = made is None
        elif len(self._known) < _MOST:
            self._known[form] = None
        return found

    def _made(self, form: Form, seeds: Mapping[int, Tensor], expected: Results) -> Recorded | None:
        """A recording that gives what is expected of the seeds; None where there is none, with the reason told."""
        own = {k: x.clone() for k, x in seeds.items()}
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            replay, results, size = self.record(lambda: by_engine(self, form, own), self._pool)
            if not self._holds(size):
                _refuse(f"memory= has no room for another {size >> 20} MiB that a recording would hold")
                return None
            made = Recorded(own, replay, results)
            wrong = disagreement(made.run(seeds), expected)
        except (RuntimeError, MemoryError) as error:
            _refuse("memory is short" if out_of_memory(error) else " ".join(str(error).split())[:200])
            return None
        if wrong is not None:
            _refuse(f"{self.graph.nodes[wrong[0]].where} is off by {wrong[1]:.1e}")
        return made if wrong is None else None


def _refuse(why: str) -> None:
    if why not in refused:
        _LOG.warning("sweeps are launched one by one, as recording them failed: %s", why)
    refused[why] = refused.get(why, 0) + 1
