"""The monitor: what is due is measured, kept, held against what was before, and given out as a flat dict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from dag_hesse._capture.losses import Loss
from dag_hesse._capture.points import Names
from dag_hesse.errors import NonFiniteError, OptionError, RankError, flag, integer, kind_of
from dag_hesse.monitor import optimizers
from dag_hesse.monitor.log import Log
from dag_hesse.monitor.pace import Pace, share
from dag_hesse.monitor.quantities import QUANTITIES, Moment, Numbers, chosen
from dag_hesse.monitor.subject import Subject, bare
from dag_hesse.options import checked_options
from dag_hesse.ranks import Ranks, together
from dag_hesse.report import CurvatureReport

_FORMAT = "dag-hesse monitor 1"


class Monitor:
    """Watches the curvature of a model in training: call :meth:`step` after each step of the optimizer.

    Model, loss and batch are captured once, here. A measurement linearizes anew at the present parameters, on the same
    batch. Training goes on bit for bit as without it.

    Args:
        model: what is trained; taken out of ``torch.compile`` and ``DistributedDataParallel``.
        batch: as for :func:`~dag_hesse.analyze`; it is kept, and the same in all measurements.
        every: measured are the steps that are multiples of it.
        budget: ``"2%"`` or 0.02: measurements are put off so that they take no more of the time since the first call.
        optimizer: steps are measured by its learning rate (and preconditioner), and curvature by the parameters that it
            holds; None: by all that require gradients.
        quantities: some of ``"loss"``, ``"update"``, ``"sharpness"``, ``"preconditioned"``, ``"stability"`` and
            ``"blocks"``; None: all that there are for the optimizer.
        loss, output, memory: as for :func:`~dag_hesse.analyze`.
        points, space, mode, probes: of the map, as for :func:`~dag_hesse.analyze`.
        training: False: measured in evaluation mode (no dropout, BatchNorm's running statistics); True: in the mode
            that the model is in, with the same dropout masks in all measurements.
        threshold: robust z-score from which on a change is abrupt.
        prefix: of the names.
        seed: of probes and of eigenvectors' starts.
        mesh: as for :func:`~dag_hesse.analyze`, where training runs in several processes with the same parameters, as
            under ``DistributedDataParallel``. Along ``"data"`` every rank's batch is a shard of what is watched; all
            ranks call :meth:`step` with the same numbers, have the same dicts, and measure with the first one's buffers
            and by its clock.

    Attributes:
        quantities: those that are measured.
        report: the last map (:class:`~dag_hesse.CurvatureReport`), or None.
        history: per name, all measurements as (step, value).
        changes: abrupt ones (:class:`~dag_hesse.monitor.Change`), in order.
        failures: what could not be measured (:class:`~dag_hesse.monitor.Failure`), in order.

    Raises:
        DagHesseError: as for :func:`~dag_hesse.analyze`; here, not during training.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> batch = torch.randn(8, 3), torch.arange(8) % 2
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = dh.Monitor(model, batch, every=2, optimizer=optimizer, points=["0"])
        >>> for step in range(1, 5):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        ...     optimizer.step()
        ...     metrics = monitor.step(step)
        >>> sorted(metrics)[:4]
        ['curvature/abrupt', 'curvature/failed', 'curvature/gn_gap/0', 'curvature/loss']
        >>> [step for step, value in monitor.history["curvature/sharpness"]]
        [1, 2, 4]
    """

    @checked_options()
    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        every: int = 100,
        budget: str | float | None = None,
        *,
        optimizer: Any = None,
        quantities: Sequence[str] | None = None,
        loss: Loss | None = None,
        output: str | None = None,
        points: Names | None = None,
        space: str = "activation",
        mode: str = "auto",
        probes: int = 8,
        training: bool = False,
        threshold: float = 5.0,
        prefix: str = "curvature",
        memory: int | str | None = None,
        seed: int = 0,
        mesh: Any = None,
    ) -> None:
        self._ranks = ranks = None if mesh is None else Ranks(mesh)
        with together(ranks, "making the monitor"):
            if ranks is not None and flag("training", training):
                raise OptionError(
                    "mesh= takes training=False: dropout's masks in training mode are those of one process's batch. "
                    "Measure in evaluation mode, or without mesh=."
                )
            agree = _own if ranks is None else partial(_of_the_first, ranks)
            self._pace = Pace(integer("every", every, 1), share(budget), agree=agree)
            self._log = log = Log(threshold)
            self.history, self.changes, self.failures = log.history, log.changes, log.failures
            self._prefix, self._seed = _prefix(prefix), integer("seed", seed, 0)
            optimizer = None if optimizer is None else optimizers.bare(optimizer)
            self.quantities = chosen(quantities, optimizer)
            self._subject = Subject(
                bare(model),
                list(batch) if isinstance(batch, Iterator) else batch,  # it is read more than once
                optimizer,
                training=flag("training", training),
                options={"loss": loss, "output": output, "memory": memory, "mesh": mesh},
                mapped={"points": points, "space": space, "mode": mode, "probes": probes, "seed": self._seed}
                | {"stable_rank": False},
                ranks=ranks,
            )
            self.report: CurvatureReport | None = None
            self._starts: dict[str, Tensor] = {}
            self._before: tuple[int, dict[str, Tensor]] | None = None  # step and parameters of the call before
            self._met = False  # whether ranks are known to go on from the same state
            self._capture()

    def _capture(self) -> None:
        """At once, so that what cannot be measured is told before training."""
        start = self._pace.clock()
        with self._subject.measuring():
            self._subject.meet(0)
            self._subject.look()
            if "blocks" in self.quantities:
                _ = self._subject.mapper
            if set(self.quantities) - {"blocks"}:
                _ = self._subject.operator
        self._pace.cost = self._pace.clock() - start  # the best guess at a measurement's, before there is one

    def step(self, step: int) -> Numbers | None:
        """Measure if it is time to; call it after each step of the optimizer, with the number of steps made.

        The update that curvature is measured along is what the parameters have moved by since the call before.

        Returns:
            Measurements by name; None between them. There is no number where there is nothing to measure: along an
            update that is zero, or for Adam before its first step. What fails is logged and counted under
            ``curvature/failed``; only an interrupt is raised.

        Raises:
            OptionError: ``step`` is no integer.
            RankError: with ``mesh=``, another rank is at another step, has another state, or does not answer.
        """
        step, pace = integer("step", step), self._pace
        self._meet(step)
        first = pace.arrive(step)
        noted = first or self._before is not None or "update" not in self.quantities
        found = None
        if noted and pace.due(step):
            self._subject.wait()
            with pace.measuring(step):
                found = self._measure(step)
        if "update" in self.quantities:
            self._note(step)
        return found

    def _meet(self, step: int) -> None:
        """At the first call, see that all ranks measure the same at the same steps: later, they go by that."""
        if self._ranks is None or self._met:
            return
        pace, before = self._pace, self._before and self._before[0]
        mine = {"step": step, "every": pace.every, "budget": pace.budget, "quantities": self.quantities}
        mine |= {"the last step": pace.last, "the next": pace.next, "an update from": before, "seed": self._seed}
        every = self._ranks.told("the first step of a monitor", mine)
        for name, value in mine.items():
            if any(theirs[name] != value for theirs in every):
                raise RankError(
                    f"of the ranks' monitors, {name} is {[theirs[name] for theirs in every]}: make, load and call them "
                    "alike on all."
                )
        self._met = True

    def _note(self, step: int) -> None:
        """Keep the parameters if the next call is to measure: at the first of several calls at one step."""
        if not self._pace.due(step + self._pace.stride):
            self._before = None
        elif self._before is None or self._before[0] != step:
            self._before = step, {}  # the last copy ends before the next is made; without one there is no update
            try:
                self._before = step, self._subject.copy()
            except Exception as error:
                self._log.failed(step, "update", error)

    def _measure(self, step: int) -> Numbers:
        found: Numbers = {}
        failed = len(self.failures)
        before, self._before = self._before, None
        with self._subject.measuring():
            try:
                with together(self._ranks, "looking at the parameters"):
                    self._subject.meet(step)
                    self._subject.look()
                    moment = Moment(self._subject, before and before[1], self._starts, (self._seed, step & (2**63 - 1)))
            except Exception as error:
                self._log.failed(step, "all", error)
            else:
                for name in self.quantities:
                    found |= self._measured(step, name, moment)
                self.report = moment.report or self.report
        metrics = {f"{self._prefix}{name}": value for name, value in found.items()}
        abrupt = self._log.keep(step, metrics)
        return metrics | {
            f"{self._prefix}abrupt": float(abrupt),
            f"{self._prefix}failed": float(len(self.failures) - failed),
        }

    def _measured(self, step: int, name: str, moment: Moment) -> Numbers:
        """One quantity; nothing that goes wrong in it may stop the training."""
        try:
            with together(self._ranks, f"measuring '{name}'"):
                found = QUANTITIES[name](moment)
                bad = [key for key, value in found.items() if not math.isfinite(value)]
                if bad:
                    raise NonFiniteError(f"{', '.join(bad)} came out as NaN or infinity.")
            if self._ranks is not None and any(theirs != found for theirs in self._ranks.told(f"'{name}'", found)):
                raise RankError(f"'{name}' is another number on another rank: do optimizers have the same settings?")
            return found
        except Exception as error:
            self._log.failed(step, name, error)
            self._subject.forget()
            self._starts.clear()
            return {}

    @property
    def seconds(self) -> float:
        """Seconds that all measurements took."""
        return self._pace.spent

    def plot(self) -> Any:
        """The history as a matplotlib Figure (extra: ``plot``).

        Raises:
            OptionError: nothing was measured yet.
            DependencyError: matplotlib is not installed.
        """
        from dag_hesse.monitor.plots import curves

        return curves(self.history, self._prefix, self.changes)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on as if it had not stopped, but the last map.

        Numbers, strings and tensors alone: ``torch.load(..., weights_only=True)`` reads it.
        """
        return {
            "format": _FORMAT,
            "pace": self._pace.state_dict(),
            "log": self._log.state_dict(),
            "starts": dict(self._starts),
            "before": self._before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            OptionError: it is no such state.
        """
        received = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        if received != _FORMAT:
            raise OptionError(f"the state is {received!r}; expected what Monitor.state_dict() gives, {_FORMAT!r}.")
        self._pace.load_state_dict(state["pace"])
        self._log.load_state_dict(state["log"])
        self._met = False
        self._starts = {name: v.cpu() for name, v in state["starts"].items()}
        self._before = None if state["before"] is None else (state["before"][0], dict(state["before"][1]))

    def __repr__(self) -> str:
        count, what = max(map(len, self.history.values()), default=0), ", ".join(self.quantities)
        return f"Monitor({type(self._subject.model).__name__}: {what}; {count} measurements, {self.seconds:.1f} s)"


def _own(step: int, mine: bool) -> bool:
    return mine


def _of_the_first(ranks: Ranks, step: int, mine: bool) -> bool:
    """What the first rank says."""
    return bool(ranks.told(f"the budget of step {step}", mine)[0])


def _prefix(prefix: Any) -> str:
    if not isinstance(prefix, str):
        raise OptionError(f"prefix={prefix!r} is {kind_of(prefix)}; expected a string.")
    return f"{prefix.rstrip('/')}/" if prefix else ""
