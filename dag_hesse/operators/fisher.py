"""The Fisher information: a Gauss–Newton operator whose loss has per-sample output gradients for a curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NoReturn, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dag_hesse._capture import Batch, Batches
from dag_hesse._capture.advice import own_labels
from dag_hesse._capture.losses import Loss, check_loss, inferred, prediction
from dag_hesse._capture.state import restored
from dag_hesse._capture.writes import Written
from dag_hesse.errors import LossError, OptionError, choose, integer, kind_of
from dag_hesse.operators.operator import CurvatureOperator
from dag_hesse.operators.wide import widened_batches, widened_loss
from dag_hesse.options import checked_options

KINDS = ("empirical", "mc")
_IGNORED = -100  # the class that cross-entropy leaves out unless it is told another one


@final
class FisherOperator(CurvatureOperator):
    """F = 1/N Σ_i g_i g_iᵀ over samples i, g_i being N times sample i's share of the loss's gradient.

    Samples all of whose targets the loss ignores (``ignore_index``) do not count.

    Args:
        model: a module, or ``callable(params, inputs) -> output`` with ``params`` given.
        batch: with targets, as for :class:`HessianOperator`; samples lie along the first axis of the model's output.
        kind: ``"empirical"``: gradients at the batch's own targets; ``"mc"``: at targets drawn from the model's own
            distribution, classes for cross-entropy, a normal distribution for mean squared error. With one target a
            sample, the mean of the latter over ``seed`` is the Gauss–Newton matrix.
        samples: targets drawn for every sample (``"mc"``).
        seed: of those; drawn once, at the parameters that the operator is made at. The global RNG is not touched.
        loss: a mean over samples; None: inferred. ``"mc"`` takes plain cross-entropy or mean squared error alone.
        options: as for :class:`HessianOperator`.

    Raises:
        LossError: there are no targets, or the loss does not depend on the model's output.
        OptionError: ``kind``, ``samples`` or ``seed`` is none of these, or the loss is none that can be used.
        DagHesseError: as for :class:`HessianOperator`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> F = dh.FisherOperator(model, batch)
        >>> F.shape, torch.linalg.matrix_rank(F.dense()).item() <= 5
        ((8, 8), True)
    """

    _part: ClassVar[str] = "gn"

    @checked_options(CurvatureOperator.__init__)
    def __init__(
        self,
        model: nn.Module | Callable[[Any, Any], Any],
        batch: Any,
        *,
        kind: str = "empirical",
        samples: int = 1,
        seed: int = 0,
        loss: Loss | None = None,
        memory: int | str | None = None,
        **options: Any,
    ) -> None:
        choose("kind", kind, KINDS)
        samples, seed = integer("samples", samples, 1), integer("seed", seed, 0)
        if kind == "empirical" and samples != 1:
            raise OptionError(f"samples={samples}; expected 1 with kind='empirical': targets are the batch's own.")
        check_loss(loss)
        if getattr(loss, "reduction", "mean") != "mean":
            raise OptionError(f"loss has reduction={loss.reduction!r}; expected a mean over samples.")  # type: ignore[union-attr]
        self._inferred = loss is None
        self._draw = partial(Drawn, loss=loss, samples=samples, seed=seed) if kind == "mc" else None
        self._drawing = {"kind=": kind, "samples=": samples, "seed=": seed, "loss=": loss}
        super().__init__(model, batch, loss=_OfGradients(loss, kind == "mc"), memory=memory, **options)

    def _asked(self) -> dict[str, Any]:
        return super()._asked() | self._drawing

    def _batches(self, batch: Any) -> Batches:
        if self._draw is None:
            return self._labelled(super()._batches(batch))
        given = self._labelled(Batches(batch, self._memory, self.model, self._loss))
        drawn = self._draw(self.model, given)
        return Batches(widened_batches(drawn, self.model, self._loss) if self._float64 else drawn, self._memory)

    def _labelled(self, batches: Batches) -> Batches:
        """The batches, unless their targets are labels for a loss that the model makes."""
        if self._inferred and any(own_labels(each, self.model) for each in batches.examples.values()):
            raise OptionError(
                "targets are the input's token ids, and a Fisher operator has no labels to shift: pass loss=, a mean "
                "over samples, that says which positions are compared."
            )
        return batches

    @property
    def loss(self) -> NoReturn:
        """A Fisher operator has none.

        Raises:
            OptionError: always.
        """
        raise OptionError("a Fisher operator has no loss of its own: take that of a HessianOperator or GGNOperator.")

    @property
    def gradient(self) -> NoReturn:
        """None, as there is no loss.

        Raises:
            OptionError: always.
        """
        raise OptionError("a Fisher operator has no gradient: take that of a HessianOperator or GGNOperator.")


class _OfGradients:
    """½/N Σ_i (g_i · out_i)², the output gradients g_i held fixed: its Hessian by the output is 1/N ⊕_i g_i g_iᵀ.

    N counts samples whose targets are not all ignored. Drawn classes are compared by plain cross-entropy: a class that
    the loss ignores may be drawn.
    """

    def __init__(self, loss: Loss | None, drawn: bool) -> None:
        self.of: Loss | None = F.cross_entropy if drawn and isinstance(loss, nn.CrossEntropyLoss) else loss
        self.drawn = drawn

    def widened(self) -> _OfGradients:
        """The same of a loss in double precision."""
        return _OfGradients(widened_loss(self.of), self.drawn)

    def __call__(self, output: Any, targets: Any) -> Tensor:
        if targets is None or isinstance(targets, dict):
            raise LossError("a Fisher operator needs targets beside the inputs: give (inputs, targets), and loss=.")
        draws = 1
        if self.drawn:  # all at once, as one batch of so many copies
            draws, output, targets = len(targets), prediction(output), torch.cat(targets)
        leaves, spec = pytree.tree_flatten(output)
        places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        with torch.enable_grad():  # some kernels want what is contiguous
            free = {k: torch.cat([leaves[k].detach()] * draws).contiguous().requires_grad_() for k in places}
            held = pytree.tree_unflatten([free.get(k, x) for k, x in enumerate(leaves)], spec)
            value = (self.of or inferred)(held, targets)
            found = torch.autograd.grad(value, list(free.values()), allow_unused=True)
        pairs = [(leaves[k], g.detach()) for k, g in zip(places, found, strict=True) if g is not None]
        if not pairs:
            raise LossError("the loss does not depend on the model's output, so there are no gradients of samples.")
        slopes = sum((g.view(draws, *x.shape) * x).reshape(draws, len(x), -1).sum(2) for x, g in pairs)
        assert isinstance(slopes, Tensor)
        return _counted(self.of, targets, slopes.numel()) / 2 * slopes.square().sum()


def _counted(loss: Loss | None, targets: Any, samples: int) -> Tensor | int:
    """How many samples a mean is over: those of which the loss does not ignore all targets."""
    ignoring = loss in (None, F.cross_entropy, F.nll_loss) or isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))
    if not ignoring or not isinstance(targets, Tensor) or targets.is_floating_point() or len(targets) != samples:
        return samples
    return (targets != _ignored(loss)).reshape(samples, -1).any(1).sum()


def _ignored(loss: Loss | None) -> int:
    """The class that a loss leaves out."""
    return int(getattr(loss, "ignore_index", _IGNORED))


class Drawn:
    """Batches whose targets are drawn from the model's distribution, once: a tuple of as many as are asked for."""

    def __init__(self, model: nn.Module, batches: Batches, loss: Loss | None, samples: int, seed: int) -> None:
        self.model, self.batches, self.loss, self.samples = model, batches, loss, samples
        self.generator = torch.Generator().manual_seed(seed)
        self.known: list[tuple[Tensor, ...]] = []

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches):
            if number == len(self.known):
                self.known.append(self._draw(batch))
            yield replace(batch, targets=self.known[number])

    def _draw(self, batch: Batch) -> tuple[Tensor, ...]:
        targets = batch.targets
        if not isinstance(targets, Tensor):
            raise LossError(f"targets are {kind_of(targets)}; kind='mc' draws tensors: give (inputs, targets).")
        with restored(self.model) as before, torch.no_grad():
            before.written += [Written.of(x) for x in self.model.buffers()]  # as a BatchNorm's statistics
            output = prediction(self.model(*batch.args, **batch.kwargs))
        draw = partial(_classes, ignored=_ignored(self.loss)) if _is_cross_entropy(self.loss, targets) else _normal
        return tuple(draw(output, targets, self.generator) for _ in range(self.samples))


def _is_cross_entropy(loss: Loss | None, targets: Tensor) -> bool:
    """Whether classes are drawn.

    Raises:
        OptionError: the loss is none whose distribution is known.
    """
    if loss is None:
        return not targets.is_floating_point()
    smooth = isinstance(loss, nn.CrossEntropyLoss) and (loss.label_smoothing != 0 or loss.weight is not None)
    if not smooth and (isinstance(loss, nn.CrossEntropyLoss) or loss is F.cross_entropy):
        return True
    if isinstance(loss, nn.MSELoss) or loss is F.mse_loss:
        return False
    raise OptionError(
        f"no distribution is known to draw targets from for the loss {loss!r}; expected plain cross-entropy or mean "
        "squared error, or kind='empirical'."
    )


def _classes(logits: Tensor, targets: Tensor, generator: torch.Generator, ignored: int) -> Tensor:
    """Drawn classes in the form of the targets; what the loss ignores stays so. Targets may be probabilities too."""
    last = logits.ndim > 2 and targets.shape == logits.shape[:-1]
    chances = (logits if last else logits.movedim(1, -1)).double().softmax(-1).cpu()
    drawn = torch.multinomial(chances.reshape(-1, chances.shape[-1]), 1, generator=generator)
    classes = drawn.reshape(chances.shape[:-1]).to(targets.device)
    if targets.is_floating_point():
        return classes
    return torch.where(targets == ignored, _IGNORED, classes.reshape(targets.shape).to(targets.dtype))


def _normal(output: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Targets of which a sample's mean squared error, over d elements, is the negative log-likelihood: variance d/2."""
    noise = torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu").to(output)
    return output + (output[0].numel() / 2) ** 0.5 * noise
