"""The linearization of every batch: made when it is swept, kept for the next pass while there is room."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from dag_hesse._capture import Batch, Batches
from dag_hesse.budget import Budget
from dag_hesse.errors import CaptureError
from dag_hesse.ir import CurvatureGraph
from dag_hesse.kernels.arena import Pool
from dag_hesse.plan.fusion import fuse
from dag_hesse.plan.memory import linearization_bytes
from dag_hesse.randomness import RandomState, preserved
from dag_hesse.sweep.compiled import Compiled, Programs
from dag_hesse.sweep.linearize import Linearization, OtherGraphError, leaf_values
from dag_hesse.sweep.meaning import Entry
from dag_hesse.sweep.product import AnyLinearization
from dag_hesse.sweep.replay import Replayed


class Linearizations:
    """Iterate to have each entry with its linearization, in order.

    Args:
        model: the module whose parameters are used.
        batches: what is linearized at.
        entries: which batches and samples; the graph of one whose forward goes another way is replaced.
        tensor_part: whether the T channel is wanted.
        with_out: linearize from ``out`` on as well.
        again: captures a batch whose values lead the forward another way than its graph goes (it is told once).
        budget: says how many are kept; the one of a single entry always is.
        compiled: whether sweeps are compiled programs.

    Attributes:
        arena: where linearizations and sweeps have their memory from.
        losses: per batch that was linearized, its loss.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        entries: Sequence[Entry],
        *,
        tensor_part: bool,
        with_out: bool,
        again: Callable[..., CurvatureGraph] | None,
        budget: Budget,
        compiled: bool,
    ) -> None:
        self.model, self.batches, self.entries = model, batches, entries
        self.tensor_part, self.with_out, self.again, self.budget = tensor_part, with_out, again, budget
        self.arena = Pool()
        self.losses: dict[int, float] = {}
        self._programs: dict[int, Programs] | None = {} if compiled else None  # by the graph's identity
        self._kept: dict[int, AnyLinearization] = {}
        self._went: set[int] = set()  # entries whose batch is known to go their graph's way
        self._bytes = 0  # of those, and of what recordings of their sweeps hold
        # Random draws are made anew in every linearization, and must agree. Batches draw one after the other.
        self._rng = {0: RandomState.now()}
        self._told = False

    @property
    def complete(self) -> bool:
        """Whether all are kept: the next pass makes none."""
        return len(self._kept) == len(self.entries)

    @property
    def evaluated(self) -> bool:
        """Whether the loss of every batch is known since :meth:`release`."""
        return all(entry.batch in self.losses for entry in self.entries)

    def release(self) -> None:
        """Let those that are kept go; the next pass makes them anew."""
        self._kept.clear()
        self._went.clear()
        self.losses.clear()
        self._bytes = 0

    def __iter__(self) -> Iterator[tuple[Entry, AnyLinearization]]:
        for entry, lin in self._each():
            yield entry, lin
            if entry.batch not in self.losses and lin.loss is not None:  # a compiled one has it from the first sweep
                self.losses[entry.batch] = float(lin.loss)

    def _each(self) -> Iterator[tuple[Entry, AnyLinearization]]:
        if self.complete:
            yield from ((entry, self._kept[place]) for place, entry in enumerate(self.entries))
            return
        waiting = deque(enumerate(self.entries))
        for number, batch in enumerate(self.batches):
            while waiting and waiting[0][1].batch == number:
                place, entry = waiting.popleft()
                yield entry, self._kept.get(place) or self._made(place, entry, batch)

    def _made(self, place: int, entry: Entry, batch: Batch) -> AnyLinearization:
        with preserved():
            start = self._rng[max(k for k in self._rng if k <= entry.batch)]  # a batch that counts nothing is left out
            start.restore()
            try:
                lin = self._linearized(entry, batch, checked=place not in self._went)
            except CaptureError as error:
                if self.again is None:
                    raise
                start.restore()
                entry.graph = self._anew(entry, batch, error)
                start.restore()
                lin = self._linearized(entry, batch, checked=False)
            self._went.add(place)
            self._rng.setdefault(entry.batch + 1, RandomState.now())
        self.losses.pop(entry.batch, None)
        if lin.loss is not None:
            self.losses[entry.batch] = float(lin.loss)
        alone = len(self.entries) == 1  # then it is needed whatever it takes
        size = 0 if alone else linearization_bytes(entry.graph, self._sites(entry))
        if self.budget.keeps(self._bytes, size):
            self._kept[place] = lin
            self._bytes += size
        return lin

    def _anew(self, entry: Entry, batch: Batch, error: CaptureError) -> CurvatureGraph:
        """The graph of a batch that its entry's graph does not fit, or may not fit."""
        assert self.again is not None
        asked, alike = isinstance(error, OtherGraphError), False
        try:
            graph = self.again(batch, before=entry.graph if asked else None)
            alike = asked and graph.looked_alike(entry.graph)  # then it looked at what rounding alone decides
        finally:
            if not alike:
                self._tell(error)
        return fuse(graph)

    def _linearized(self, entry: Entry, batch: Batch, *, checked: bool) -> AnyLinearization:
        if self._programs is not None:
            made = Programs(entry.graph, self._sites(entry), self.tensor_part)
            programs = self._programs.setdefault(id(entry.graph), made)
            return Compiled(programs, self.model, batch.tensors, entry.sample, checked)
        kind = Replayed if self.batches.device.type == "cuda" else Linearization
        more: dict[str, Any] = {"holds": self._holds} if issubclass(kind, Replayed) else {}
        return kind(
            entry.graph,
            leaf_values(entry.graph, self.model, batch.tensors),
            self._sites(entry),
            tensor_part=self.tensor_part,
            sample=entry.sample,
            checked=checked,
            arena=self.arena,
            **more,
        )

    def _holds(self, size: int) -> bool:
        """Whether there is room for a recording of so many bytes beside what is kept; it is counted then."""
        room = self.budget.keeps(self._bytes, size)
        self._bytes += size if room else 0
        return room

    def _sites(self, entry: Entry) -> set[int]:
        sites = {k for point in entry.points for k in point.sites}
        return sites | set(entry.graph.out) if self.with_out else sites

    def _tell(self, error: CaptureError) -> None:
        if not self._told:
            warnings.warn(f"captured anew, as the forward takes another way now: {error}", stacklevel=2)
        self._told = True
