"""Points, batches and batch mode put together: vectors in, vectors out, whatever the batch axis means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dag_hesse._capture import Batches
from dag_hesse._capture.reduction import Reduction
from dag_hesse.alike import described
from dag_hesse.budget import Budget
from dag_hesse.ir import CurvatureGraph
from dag_hesse.kernels.arena import Pool
from dag_hesse.ranks import Ranks, together
from dag_hesse.sweep.gradient import gradient
from dag_hesse.sweep.kept import Linearizations
from dag_hesse.sweep.meaning import Entry, read_meaning
from dag_hesse.sweep.meeting import of_loss, of_ops, of_points
from dag_hesse.sweep.parts import Parts, Request
from dag_hesse.sweep.product import AnyLinearization
from dag_hesse.sweep.runner import Progress, Runner
from dag_hesse.sweep.shared import run_shared
from dag_hesse.sweep.watch import Watch, check_unchanged


class Problem:
    """What is to be measured: a model, its batches, its points, and what the batch axis means.

    Args:
        model: the module whose parameters are used.
        graphs, batches: one captured graph per batch (the same object for batches of equal shapes).
        batch_mode: ``"shared"``, ``"per_sample"`` or ``"joint"`` (design §2.3).
        reduction: how the batches' losses add up.
        tensor_part: whether the T channel is wanted.
        with_out: linearize from ``out`` on as well (the Gram route's columns start there).
        chunk: most probes in one sweep; halved when memory runs out.
        again: captures a batch whose values lead the forward another way than its graph goes (it is told once).
        loss: what the loss was asked of; watched for changes.
        compiled: whether sweeps are compiled programs.
        ranks: that work on it together; all make the same calls then.
        asked: options of the call by name, which ranks must have alike.
        memory: bytes that may be used, a quarter of them for linearizations that are kept; None: what is free.

    Attributes:
        points, groups, batch_mode, embedding, entries, separate_groups: as of
            :class:`~dag_hesse.sweep.meaning.Meaning`.
        budget: what may be used.
        watch: notices changes of what was linearized.
        renewals: how often :meth:`renew` took changes for granted.
    """

    def __init__(
        self,
        model: nn.Module,
        graphs: Sequence[CurvatureGraph],
        batches: Batches,
        batch_mode: str,
        *,
        reduction: Reduction = Reduction("mean"),  # noqa: B008  (frozen)
        tensor_part: bool = True,
        with_out: bool = True,
        chunk: int = 8,
        again: Callable[..., CurvatureGraph] | None = None,
        loss: Any = None,
        memory: int | str | None = None,
        compiled: bool = False,
        ranks: Ranks | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        self.ranks, self.asked = ranks, dict(asked or {})
        self.model, self.batches, self.reduction, self.batch_mode = model, batches, reduction, batch_mode
        self.compiled = compiled
        self._given = list(graphs)
        self._meaning = meaning = read_meaning(graphs, batches.sizes, batch_mode, reduction)
        self.points, self.groups, self.embedding = meaning.points, meaning.groups, meaning.embedding
        self.entries, self.separate_groups = meaning.entries, meaning.separate_groups
        self.budget = Budget.of(memory, batches.device)
        self._kept = Linearizations(
            model,
            batches,
            meaning.entries,
            tensor_part=tensor_part,
            with_out=with_out,
            again=again,
            budget=self.budget,
            compiled=compiled,
        )
        self._runner = Runner(meaning, self._kept, chunk)
        self.watch = Watch(model, self.graphs, batches, loss)
        self.renewals = 0

    @property
    def graphs(self) -> list[CurvatureGraph]:
        """The graph of every entry."""
        return [entry.graph for entry in self.entries]

    def settled(self) -> list[CurvatureGraph]:
        """A graph per batch that goes the batch's way: one that batches share may not go everybody's."""
        times = Counter(map(id, self._given))
        if any(graph.guards and times[id(graph)] > 1 for graph in self._given):
            for _ in self._kept:
                pass
        now = {entry.batch: entry.graph for entry in self.entries}
        return [now.get(number, graph) for number, graph in enumerate(self._given)]

    @property
    def with_out(self) -> bool:
        """Whether linearizations reach on from ``out``."""
        return self._kept.with_out

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of vectors: the widest of the points'."""
        return self._meaning.dtype

    def dtype_of(self, index: int) -> torch.dtype:
        """Floating-point type of a point: the widest of its nodes'."""
        return self._meaning.dtype_of(index)

    def dim(self, index: int) -> int:
        """Length of a point's vectors, per group."""
        return self._meaning.dim(index)

    @property
    def total(self) -> int:
        """Samples of all batches, those of other ranks too."""
        if self.ranks is None:
            return self.batches.total
        return sum(self.ranks.of_shards("samples", self.batches.total))

    @property
    def device(self) -> torch.device:
        """Where the batch lies."""
        return self.batches.device

    @property
    def loss(self) -> float:
        """The loss over all batches; before any sweep, as it was captured."""
        own = self._own_loss
        if self.ranks is None:
            return own
        return float(self.ranks.added([torch.tensor([own], dtype=torch.float64, device=self.device)])[0])

    @property
    def _own_loss(self) -> float:
        """Over this rank's batches."""
        shares, losses = self._meaning.shares, self._kept.losses
        if losses:
            return sum(value * shares[number] for number, value in losses.items())
        return sum(entry.graph.value * shares[entry.batch] for entry in self.entries if entry.sample is None)

    def meet(self) -> None:
        """See that all ranks, if there are several, compute one function of one model, and ask the same of it.

        Those that share vectors have the same samples, too.

        Raises:
            RankError: they do not.
            OptionError: BatchNorm normalizes by the statistics of a shard.
        """
        if self.ranks is not None:
            graph, batches = self._given[0], self.batches
            asked = {name: described(value) for name, value in self.asked.items()}
            mine = {**asked, **of_loss(self.watch.loss, batches), **of_points(graph)}
            self.ranks.check_model(self.model, mine, of_ops(graph, batches))
            self.ranks.check_loss(self._own_loss)

    @property
    def chunk(self) -> int:
        """Most probes in one sweep."""
        return self._runner.chunk

    @chunk.setter
    def chunk(self, count: int) -> None:
        self._runner.chunk = count

    @property
    def sweeps(self) -> int:
        """Probes swept so far."""
        return self._runner.sweeps

    @property
    def arena(self) -> Pool:
        """Where linearizations and sweeps have their memory from."""
        return self._kept.arena

    def release(self) -> None:
        """Let the kept linearizations go; the next sweep makes them anew."""
        self._kept.release()

    def renew(self) -> None:
        """Take tensors for what they are now, so that the next sweep linearizes anew.

        It must be captured anew instead where training flags or settings are others (:meth:`Watch.alike`).
        """
        self.release()
        self.watch.note_values()
        self.renewals += 1

    def check(self, what: str, advice: str) -> None:
        """Raise :class:`StaleError` if something changed since the problem was posed (or last noted)."""
        with together(self.ranks, "a product"):
            check_unchanged(self.watch, what, advice)

    def linearizations(self) -> Iterator[tuple[Entry, AnyLinearization]]:
        """Each entry with its linearization: kept for the next pass while there is room, else made anew.

        Raises:
            UnstableLoaderError: a loader that is iterated again does not give what it gave first.
        """
        return iter(self._kept)

    def evaluated(self) -> float:
        """The loss over all batches at the parameters' present values: batches that are not linearized yet, are."""
        if not self._kept.evaluated:
            self.gradient()
        return self.loss

    def gradient(self) -> list[Tensor]:
        """The loss's gradient: per point, (groups, dim)."""
        if self.ranks is None:
            return gradient(self._meaning, self._kept)
        with self.ranks.together("a gradient"):
            own = gradient(self._meaning, self._kept)
        return self.ranks.added(own)

    def run(
        self, requests: Sequence[Request], *, parts: str = "both", progress: Progress | None = None
    ) -> list[dict[int, Parts]]:
        """Sweep all requests through all entries; ``parts`` as in :func:`~dag_hesse.sweep.engine.sweep`.

        Returns:
            Per request, ``{read point: Parts}``; shared entries are added, per-sample groups put side by side.

        Raises:
            UnstableLoaderError: a loader that is iterated again does not give what it gave first.
            NonFiniteError: second derivatives are not finite.
        """
        if self.ranks is None:
            return self._runner.run(requests, parts, progress)
        return run_shared(self.ranks, self._runner, requests, parts, progress)
