"""Hessian, Gauss–Newton and tensor part as symmetric linear operators: captured once, linearized once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from dag_hesse._capture import Batches, capture_all, needs_split, points_like
from dag_hesse._capture.losses import Loss
from dag_hesse._capture.reduction import Option, find_reduction, shared_reduction
from dag_hesse.budget import Budget
from dag_hesse.errors import OptionError, choose, flag
from dag_hesse.kernels.arena import Arena
from dag_hesse.operators.base import SymmetricOperator
from dag_hesse.operators.factor import Factor, factored
from dag_hesse.operators.functional import as_module, chosen_parameters, read_parameters
from dag_hesse.operators.vectors import VectorForm
from dag_hesse.options import checked_options
from dag_hesse.plan import fuse_all
from dag_hesse.plan.memory import probe_chunk, shared_chunk, sweep_bytes
from dag_hesse.ranks import Ranks, together, whole_model
from dag_hesse.sweep import VERIFY, Parts, Problem, Request, capture_anew, prove_all


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
        points: names or globs, instead of all parameters (or of the points chosen).
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
        points: Sequence[str] | str | None = None,
        param_filter: Any = None,
        output: str | None = None,
        batch_mode: str = "shared",
        reduction: Option = None,
        memory: int | str | None = None,
        verify: str = "gradient",
        compile: bool = False,
        mesh: Any = None,
    ) -> None:
        choose("verify", verify, VERIFY)
        flag("compile", compile)
        self._ranks = None if mesh is None else Ranks(mesh)
        with together(self._ranks, "making the operator"):
            model = model if self._ranks is None else whole_model(model)
            choose("space", space, ("parameter", "activation"))
            choose("batch_mode", batch_mode, ("shared", "joint"))
            if self._ranks is not None and batch_mode != "shared":
                raise OptionError("mesh= takes batch_mode='shared': vectors of samples would lie on other ranks.")
            module, params = as_module(model, params)
            if (points is not None or space == "activation") and not (params is None and param_filter is None):
                raise OptionError(
                    "params= and param_filter= pick among all parameters: not with points= or space='activation'."
                )
            batches = Batches(batch, memory, module)
            batches.check_batch_mode(batch_mode)
            wanted: Any = points
            own = chosen_parameters(module, params, param_filter) if points is None and space == "parameter" else []
            if own:
                wanted = partial(read_parameters, own, module)
            self.model = module
            self._set_up = partial(
                self._captured,
                batches,
                own,
                wanted,
                loss,
                space,
                output,
                batch_mode,
                reduction,
                verify,
                Budget.of(memory, batches.device),
                compile,
            )
            self._set_up()

    def _captured(
        self,
        batches: Batches,
        own: Sequence[str],
        points: Any,
        loss: Loss | None,
        space: str,
        output: str | None,
        batch_mode: str,
        reduction: Option,
        verify: str,
        budget: Budget,
        compiled: bool,
    ) -> None:
        """Capture, prove and pose the problem."""
        module, ranks = self.model, self._ranks
        graphs = capture_all(module, batches, loss=loss, output=output, points=points, space=space)
        if self._part != "full":
            needs_split(graphs)
        like = partial(points_like, graphs[0], module)
        prove_all(graphs, batches, module, loss, output, verify)
        if ranks is None or ranks.data is None:
            self.reduction = find_reduction(module, graphs, batches, loss, reduction)
        else:
            self.reduction = shared_reduction(module, graphs, batches, loss, reduction, ranks)
        if ranks is not None:
            ranks.check_model(module)
        graphs = fuse_all(graphs)
        again = partial(capture_anew, module, loss=loss, output=output, points=like, space=space, verify=verify)
        self._problem = Problem(
            module,
            graphs,
            batches,
            batch_mode,
            reduction=self.reduction,
            with_out=False,
            again=again,
            loss=loss,
            memory=budget.total,
            compiled=compiled,
            ranks=ranks,
        )
        sites = [k for point in graphs[0].points for k in point.sites]
        cap = budget.sweeps // 2  # vectors that come and go take as much
        per_probe = max(1, sweep_bytes(graphs[0], sites, sites, batch_mode=batch_mode))
        self._problem.chunk = probe_chunk(per_probe, cap)
        if space == "parameter":  # vectors are large themselves, and chunks of them are copied together again
            self._problem.chunk = max(1, min(cap // per_probe, shared_chunk(graphs[0], sites)))
        found = {point.name: k for k, point in enumerate(self._problem.points)}
        # Points come in topological order; vectors keep the order of the model's (or the user's) parameters.
        every = [name for name, _ in module.named_parameters()]
        rest = sorted(found, key=lambda name: every.index(name) if name in every else found[name])
        self._order = [found.get(name) for name in own or rest]
        self.form = self._make_form(own or rest)

    def _make_form(self, names: Sequence[str]) -> VectorForm:
        problem, parameters = self._problem, dict(self.model.named_parameters())
        shapes, dtypes = [], []
        for name, k in zip(names, self._order, strict=True):
            if k is None:  # the loss does not depend on it
                shapes.append(tuple(parameters[name].shape))
                dtypes.append(parameters[name].dtype)
                continue
            point = problem.points[k]
            whole = problem.batch_mode == "joint" and problem.groups == 1 and point.kind == "activation"
            shape = (problem.dim(k),) if whole else point.shape
            shapes.append(shape if problem.groups == 1 else (problem.groups, *shape))
            dtypes.append(problem.dtype_of(k))
        return VectorForm(tuple(names), tuple(shapes), problem.dtype, problem.device, tuple(dtypes))

    @property
    def chunk(self) -> int:
        """How many vectors are swept together."""
        return self._problem.chunk

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
        self._problem.check("the operator was made", "call refresh() first.")
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

    def refresh(self) -> None:
        """Linearize anew at the parameters' present values.

        Nothing is captured again, unless a module has another training flag (``train()``, ``eval()``) or other
        settings: numbers, flags and functions among its attributes, submodules, hooks, what a loss function was given.
        """
        with together(self._ranks, "refresh()"):
            if not self._problem.renewed():
                self._set_up()
            elif self._ranks is not None:
                self._ranks.check_model(self.model)

    def release(self) -> None:
        """Give back the memory of the linearization, and that in which products lie; the next product makes it anew.

        Example:
            >>> import torch, dag_hesse as dh
            >>> H = dh.HessianOperator(torch.nn.Linear(3, 1), (torch.ones(2, 3), torch.zeros(2, 1)))
            >>> before = H @ torch.ones(4)
            >>> H.release()
            >>> torch.equal(H @ torch.ones(4), before)
            True
        """
        self._problem.release()
        self._problem.arena.retire()

    @property
    def loss(self) -> float:
        """The loss over all batches, at the parameters' present values.

        Raises:
            StaleError: something changed since the operator was made.
        """
        self._problem.check("the operator was made", "call refresh() first.")
        return self._problem.evaluated()

    @property
    def gradient(self) -> Tensor:
        """The loss's gradient (n,), a flat vector as ``H @`` takes it; :meth:`by_name` divides it.

        It is one adjoint pass over the linearization that products use, so it costs a backward pass (after a product),
        and is the gradient of what products are the curvature of: same batches, same dropout masks.

        Raises:
            StaleError: something changed since the operator was made.

        Example:
            >>> import torch, dag_hesse as dh
            >>> model = torch.nn.Linear(3, 1)
            >>> H = dh.HessianOperator(model, (torch.ones(2, 3), torch.ones(2, 1)))
            >>> H.by_name(H.gradient)["bias"].shape, abs(H.loss - (H.gradient[3] / 2).item() ** 2) < 1e-6
            (torch.Size([1]), True)
        """
        self._problem.check("the operator was made", "call refresh() first.")
        found = self._problem.gradient()
        sizes = zip(self._order, self.form.sizes, strict=True)
        blank = (
            torch.zeros(size, dtype=self.dtype, device=self.device) if k is None else found[k] for k, size in sizes
        )
        return torch.cat([x.reshape(-1).to(self.dtype) for x in blank])


@final
class HessianOperator(CurvatureOperator):
    """H = GGN + tensor part (design §2.2).

    Example:
        >>> import torch, dag_hesse as dh
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> H = dh.HessianOperator(model, (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])))
        >>> H.shape, (H @ torch.ones(26)).shape
        ((26, 26), torch.Size([26]))
    """

    _part = "full"

    def parts(self, v: Any) -> tuple[Any, Any]:
        """(GGN · v, tensor part · v) from one sweep, in the form of ``v``."""
        needs_split(self._problem.graphs)
        segments, unpack = self.form.pack(v, self._arena)
        gn, tensor = self._apply(segments, ("gn", "tensor"), "both")
        return unpack(gn), unpack(tensor)


@final
class GGNOperator(CurvatureOperator):
    """The generalized Gauss–Newton part Jᵀ(∇²L)J."""

    _part = "gn"

    def factor(self) -> Factor:
        """A square root: ``(rows, signs)``, (r, n) and (r,), with G = rowsᵀ diag(signs) rows; r ≤ outputs of the batch.

        It takes an adjoint pass per sample and direction in which its loss is curved, and no probes. With ``K = rows @
        rows.T`` small, (G + λI)⁻¹ is exact by Woodbury's formula, and for a convex loss K has G's eigenvalues.

        Raises:
            MemoryBudgetError: it would not fit.
            OptionError: the operator's batch mode is ``"joint"`` and samples do not interact, or it has several ranks.
            StaleError: something changed since the operator was made.

        Example:
            >>> import torch, dag_hesse as dh
            >>> G = dh.GGNOperator(torch.nn.Linear(30, 3), (torch.randn(4, 30), torch.tensor([0, 1, 2, 0])))
            >>> S = G.factor().rows
            >>> S.shape, torch.allclose(S.T @ S, G.dense(), atol=1e-5)
            (torch.Size([8, 93]), True)
        """
        if self._ranks is not None:
            raise OptionError("an operator of several ranks has no factor: its rows lie on all of them.")
        self._problem.check("the operator was made", "call refresh() first.")
        return factored(self._problem, self._order, self.form, self._budget)


@final
class TensorOperator(CurvatureOperator):
    """What Gauss–Newton leaves out of the Hessian."""

    _part = "tensor"


@checked_options(CurvatureOperator.__init__)
def hvp(model: Any, batch: Any, v: Any, **options: Any) -> Any:
    """One Hessian-vector product; options as for :class:`HessianOperator`.

    Example:
        >>> import torch, dag_hesse as dh
        >>> model = torch.nn.Linear(3, 1)
        >>> dh.hvp(model, (torch.ones(2, 3), torch.zeros(2, 1)), torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([2., 2., 2., 2.])
    """
    return HessianOperator(model, batch, **options) @ v
