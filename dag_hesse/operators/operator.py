"""Curvature as a symmetric linear operator: captured once, linearized once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dag_hesse._capture import Batches
from dag_hesse._capture.losses import Loss, check_loss
from dag_hesse._capture.points import Names
from dag_hesse._capture.reduction import Option
from dag_hesse.budget import Budget
from dag_hesse.errors import OptionError, choose, flag
from dag_hesse.gathered import gathered, is_sharded, regather
from dag_hesse.kernels.arena import Arena
from dag_hesse.operators.base import SymmetricOperator
from dag_hesse.operators.functional import as_module, chosen_parameters
from dag_hesse.operators.landscape import Landscape, landscape
from dag_hesse.operators.posing import Known, Pose
from dag_hesse.operators.wide import Origin, Shards, follow, widened, widened_batches, widened_loss
from dag_hesse.options import checked_options
from dag_hesse.ranks import Ranks, agree, together, whole_model
from dag_hesse.sweep import VERIFY, Parts, Request
from dag_hesse.sweep.watch import check_unchanged

if TYPE_CHECKING:
    from typing_extensions import Self


class CurvatureOperator(SymmetricOperator):
    """A symmetric operator over the concatenation of its points; use one of the three subclasses.

    Args:
        model: a module, or ``callable(params, inputs) -> output`` with ``params`` given.
        batch: as for :func:`~dag_hesse.analyze`; a loader's batches are one loss.
        loss: ``callable(output, targets) -> scalar``; None: the model's own, or inferred.
        params: parameters to differentiate by: a list of the model's own, or a dict or list for a callable model.
            Vectors go through them in this order (by default as ``model.parameters()`` does); blocks of those that the
            loss does not depend on are zero.
        space: ``"parameter"`` (default: all parameters that require gradients) or ``"activation"``.
        points: names or globs, instead of all parameters (or of the points chosen); a mapping of names to names or
            globs makes each group of parameters one segment.
        param_filter: glob, globs, or ``callable(name, parameter) -> bool`` that picks among the parameters. As in
            ``points``, ``*`` does not cross dots and ``**`` does: ``"**.bias"`` is every bias, ``"layer*"`` all of
            those modules.
        output: name of what the loss consumes, where it cannot be inferred.
        batch_mode: meaning of the batch axis of activations, ``"shared"`` or ``"joint"``.
        reduction: how the losses of several batches add up: ``"mean"`` over samples, ``"sum"``, a weight per batch, or
            a callable that gives a batch's weight; None: found by evaluating the loss on sub-batches (for a mean,
            a loader that is not held is iterated once more).
        memory: as for :func:`~dag_hesse.analyze`: bytes (or ``"4GiB"``) that each product may use, with what is kept
            between them and what :meth:`dense` makes.
        verify: as for :func:`~dag_hesse.analyze`: what the captured graph is compared with, once.
        compile: as for :func:`~dag_hesse.analyze`: products are programs of TorchInductor. The first product with so
            many vectors compiles for a minute or more, and is held against the product without a compiler.
        float64: products in double precision of a model that is not: a copy of it, of its batches and of the tensors
            of its loss is used (random draws are the copy's), which follows the model's values in :meth:`refresh`.
        mesh: a ``DeviceMesh`` of ``torch.distributed``. Along its axis ``"data"`` every rank brings other samples, and
            the operator is that of all samples, as if one process had them; along ``"probe"`` every rank has the same
            samples and sweeps some of the vectors. Every rank makes the same calls with the same vectors.

    Raises:
        DagHesseError: as :func:`~dag_hesse.analyze`; :class:`~dag_hesse.errors.VectorError` for a bad vector;
            :class:`~dag_hesse.errors.UnstableLoaderError` where a loader that is iterated again changes;
            :class:`~dag_hesse.errors.ReductionError` where the losses of batches do not add up to one.
    """

    _part: ClassVar[str]

    @checked_options()
    def __init__(
        self,
        model: nn.Module | Callable[[Any, Any], Any],
        batch: Any,
        *,
        loss: Loss | None = None,
        params: Any = None,
        space: str = "parameter",
        points: Names | None = None,
        param_filter: Any = None,
        output: str | None = None,
        batch_mode: str = "shared",
        reduction: Option = None,
        memory: int | str | None = None,
        verify: str = "gradient",
        compile: bool = False,
        float64: bool = False,
        mesh: Any = None,
    ) -> None:
        choose("verify", verify, VERIFY)
        flag("compile", compile)
        self._float64 = flag("float64", float64)
        self._ranks = None if mesh is None else Ranks(mesh)
        with together(self._ranks, "making the operator"):
            model = model if self._ranks is None else whole_model(model)
            choose("space", space, ("parameter", "activation"))
            choose("batch_mode", batch_mode, ("shared", "joint"))
            if self._ranks is not None and batch_mode != "shared":
                raise OptionError("mesh= takes batch_mode='shared': vectors of samples would lie on other ranks.")
            if self._ranks is not None and float64:
                raise OptionError("mesh= takes no float64=True: give model.double() and batches of float64 instead.")
            module, params = as_module(model, params)
            if (points is not None or space == "activation") and not (params is None and param_filter is None):
                raise OptionError(
                    "params= and param_filter= pick among all parameters: not with points= or space='activation'."
                )
            check_loss(loss)
            self._sharded = self._ranks is not None and is_sharded(module)
            self.model, self._loss, self._memory = module, loss, memory
            batches = self._batches(batch)
            batches.check_batch_mode(batch_mode)
            parameters = points is None and space == "parameter"
            named = None if params is None else chosen_parameters(module, params, None)
            self._chosen = partial(chosen_parameters, module, named, param_filter) if parameters else list
            budget = Budget.of(memory, batches.device)
            options = points, space, output, batch_mode, reduction, verify, budget, compile
            asked = {"model": None if isinstance(model, nn.Module) else model, "space=": space, "output=": output}
            self._pose = Pose(module, loss, (), *options, self._part, self._ranks, {**self._asked(), **asked})
            self._take(batch, batches)

    def _asked(self) -> dict[str, Any]:
        """What ranks must have asked alike, by name."""
        return {"the operator": type(self).__name__, "loss=": self._loss}

    def _batches(self, batch: Any) -> Batches:
        """The batches as they are swept."""
        given = widened_batches(batch, self.model, self._loss) if self._float64 else batch
        return Batches(given, self._memory, self.model, self._loss)

    def _take(self, batch: Any, batches: Batches, known: Known | None = None) -> None:
        """Capture what is not ``known``, prove and pose the problem."""
        self._given, self._swept = batch, batches
        if known is None:
            self._pose = replace(self._pose, own=self._chosen())
        if self._float64 and known is None:
            self._pose = replace(self._pose, module=widened(self.model), loss=widened_loss(self._loss))
        if self._ranks is not None and self._sharded and known is None:
            self._pose = replace(self._pose, module=gathered(self.model, self._ranks, self._pose.budget))
        posed = self._pose.posed(batches, known)
        self._problem, self._order, self._known = posed.problem, posed.order, posed.known
        self.form, self.reduction = posed.form, posed.reduction
        self._origin: Origin | None = None
        if self._float64 or self._sharded:
            watch = Origin if self._float64 else Shards
            self._origin = watch(self.model, batch, self._problem.graphs, self._loss)

    def _check(self) -> None:
        """Raise :class:`StaleError` where something changed."""
        self._problem.check("the operator was made", "call refresh() first.")
        if self._origin is not None:
            with together(self._ranks, "a product of shards"):
                check_unchanged(self._origin, "the operator was made", "call refresh() first.")

    def _follows(self) -> bool:
        """Whether captured graphs are the model's still; a copy of it takes its values."""
        alike = (self._origin or self._problem.watch).alike()
        if self._ranks is not None:  # all capture, or none
            alike = all(self._ranks.told("settings", alike))
        if alike and self._origin is not None:
            (regather if self._sharded else follow)(self._pose.module, self.model)
            self._origin.note()
        return alike

    @property
    def chunk(self) -> int:
        """How many vectors are swept together."""
        return self._problem.chunk

    @property
    def _together(self) -> Ranks | None:
        return self._ranks

    @property
    def _budget(self) -> Budget:
        return self._problem.budget

    @property
    def _arena(self) -> Arena:
        return self._problem.arena

    def _products(self, segments: list[Tensor]) -> list[Tensor]:
        return self._apply(segments)[0]

    def _between(self, segments: list[Tensor], rows: Sequence[int], columns: Sequence[int]) -> list[Tensor]:
        found = self._run(segments, self._part, columns, rows)
        return self._collect(found, "full", len(segments[0]), rows)

    def _run(
        self, segments: Sequence[Tensor], parts: str, sources: Sequence[int], reads: Sequence[int]
    ) -> dict[int, Parts]:
        self._check()
        groups = self._problem.groups
        pairs = [(self._order[k], x) for k, x in zip(sources, segments, strict=True)]
        z = {k: x.detach().reshape(len(x), groups, -1) for k, x in pairs if k is not None}
        read = tuple(k for r in reads if (k := self._order[r]) is not None)
        return self._problem.run([Request(z, read)], parts=parts)[0] if z and read else {}

    def _collect(self, found: dict[int, Parts], part: str, count: int, reads: Sequence[int]) -> list[Tensor]:
        segments = []
        for k in reads:
            place, shape = self._order[k], (count, self.form.sizes[k])
            value: Tensor | None = None if place not in found else getattr(found[place], part)
            blank = torch.zeros(shape, dtype=self.dtype, device=self.device) if value is None else value
            segments.append(blank.reshape(shape))
        return segments

    def _apply(
        self, segments: Sequence[Tensor], read: Sequence[str] = ("full",), parts: str | None = None
    ) -> list[list[Tensor]]:
        every = range(len(self.form.names))
        found = self._run(segments, parts or self._part, every, every)
        return [self._collect(found, part, len(segments[0]), every) for part in read]

    def refresh(self, batch: Any = None) -> None:
        """Linearize anew at the parameters' present values, and on another batch if one is given.

        Nothing is captured again, unless a module has another training flag (``train()``, ``eval()``) or other
        settings: numbers, flags and functions among its attributes, submodules, hooks, what a loss function was given;
        it has other parameters, or of other shapes, or other buffers; or a batch has other shapes or types than those
        before, or leads the forward another way.
        """
        with together(self._ranks, "refresh()"):
            follows = self._follows()
            if batch is None and self._float64 and not isinstance(self._given, Iterator):
                batch = self._given  # of which what is swept is a copy
            if batch is not None:
                self._take(batch, self._batches(batch), self._known if follows else None)
            elif follows and (self._origin is None or self._problem.watch.alike()):
                self._problem.renew()
                self._problem.meet()
            else:
                self._take(self._given, self._swept)

    def with_batch(self, batch: Any) -> Self:
        """The same operator on another batch, at the parameters' present values; this one stays as it is.

        Args:
            batch: as for the operator. Of shapes and types that it has seen, nothing is captured or proved again.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> H = dh.HessianOperator(torch.nn.Linear(3, 1), (torch.ones(2, 3), torch.zeros(2, 1)))
            >>> H.with_batch((2 * torch.ones(2, 3), torch.zeros(2, 1))) @ torch.ones(4), H @ torch.ones(4)
            (tensor([28., 28., 28., 14.]), tensor([8., 8., 8., 8.]))
        """
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        with together(self._ranks, "with_batch()"):
            other._take(batch, other._batches(batch), self._known if self._follows() else None)
        return other

    def release(self) -> None:
        """Give back the memory of the linearization, and that in which products lie; the next product makes it anew.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> H = dh.HessianOperator(torch.nn.Linear(3, 1), (torch.ones(2, 3), torch.zeros(2, 1)))
            >>> before = H @ torch.ones(4)
            >>> H.release()
            >>> torch.equal(H @ torch.ones(4), before)
            True
        """
        self._problem.release()
        self._problem.arena.retire()

    @checked_options()
    def landscape(self, directions: Any = None, span: float = 1.0, points: int = 21) -> Landscape:
        """The model's own loss on a line or a plane through the parameters, beside what the operator predicts.

        Args:
            directions: a vector in any form, an :class:`~dag_hesse.Eigenpair`, or a list of one or two of these; None:
                the eigenvector of the eigenvalue largest in magnitude.
            span: steps go from -span to span, in units of the directions' lengths (eigenvectors have 1).
            points: steps along each direction; each takes a forward pass of all batches.

        Returns:
            A :class:`Landscape` with steps, losses and predictions; ``.plot()`` draws it. The model is not changed.

        Raises:
            OptionError: an option is none of these, or the operator is over activations, or has no loss.
            VectorError: a direction does not fit.
            StaleError: something changed since the operator was made.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> H = dh.HessianOperator(torch.nn.Linear(9, 1), (torch.ones(2, 9), torch.zeros(2, 1)))
            >>> found = H.landscape(H.top_eigenvectors(1), span=0.1, points=5)
            >>> low, centre, high = found.losses[[0, 2, 4]]
            >>> found.losses.shape, float(found.curvature[0].round(2)), bool(low + high > 2 * centre)
            ((5,), 20.0, True)
        """
        agree(self._ranks, "landscape()", directions=directions, span=span, points=points)
        return landscape(self, directions, span, points)

    @property
    def loss(self) -> float:
        """The loss over all batches, at the parameters' present values.

        Raises:
            StaleError: something changed since the operator was made.
        """
        self._check()
        return self._problem.evaluated()

    @property
    def gradient(self) -> Tensor:
        """The loss's gradient (n,), a flat vector as ``H @`` takes it; :meth:`by_name` divides it.

        It is one adjoint pass over the linearization that products use, so it costs a backward pass (after a product),
        and is the gradient of what products are the curvature of: same batches, same dropout masks.

        Raises:
            StaleError: something changed since the operator was made.

        Examples:
            >>> import torch, dag_hesse as dh
            >>> model = torch.nn.Linear(3, 1)
            >>> H = dh.HessianOperator(model, (torch.ones(2, 3), torch.ones(2, 1)))
            >>> H.by_name(H.gradient)["bias"].shape, abs(H.loss - (H.gradient[3] / 2).item() ** 2) < 1e-6
            (torch.Size([1]), True)
        """
        self._check()
        found = self._problem.gradient()
        sizes = zip(self._order, self.form.sizes, strict=True)
        blank = (
            torch.zeros(size, dtype=self.dtype, device=self.device) if k is None else found[k] for k, size in sizes
        )
        return torch.cat([x.reshape(-1).to(self.dtype) for x in blank])
