"""How much batches count beside a reference: samples of one of them, put together with each, and tried.

Where the loss is a sum over samples of terms ℓ_b over a weight w, the gradient of a batch alone is that of its terms
over w(batch), and beside a reference that of the same terms over w(batch) + w(reference), whatever ℓ is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dag_hesse._capture.batch import Batch
from dag_hesse._capture.factors import check_same, factors_of, halves, multiple, tolerance_of, usable, verdict
from dag_hesse._capture.losses import Loss
from dag_hesse._capture.reduction import ADVICE, Reduction
from dag_hesse._capture.stream import Batches
from dag_hesse._capture.sub_batches import OnOutputs, Piece, parameter_gradient, put_together, sub_batch
from dag_hesse.errors import ReductionError
from dag_hesse.ir import BatchAxis, CurvatureGraph

_MOST = 32  # batches whose outputs are put together to be looked at
_MOST_RUNS = 8  # that a model is run on
_ALIKE = 1e-6  # of two gradients, 1 - cos²: nobody can tell how much of their sum is of either
NO_GRADIENT = f"the loss has no gradient at the model's output to tell it by, so {ADVICE}"


class Told(NamedTuple):
    """What two sub-batches of a batch tell of a loss.

    ``kind``: "sum" or "mean". ``reference``: what others are put beside. ``number``: the batch's; ``parts``: the
    sub-batches' samples, and how much they count in their whole.
    """

    kind: str
    reference: Any
    number: int
    parts: list[tuple[Tensor, float]]


class Beside(ABC):
    """What the two ways to try a loss share: the batches, and graphs of them."""

    exact = True  # weights have the loss's own precision

    def __init__(self, model: nn.Module, graphs: Sequence[CurvatureGraph], batches: Batches, loss: Loss | None) -> None:
        self.model, self.graphs, self.batches, self.loss = model, graphs, batches, loss
        self.tolerance = tolerance_of(graphs[0])

    @abstractmethod
    def tell(self) -> Told | None:
        """Whether the loss is a sum or a mean; None where no batch has a gradient to tell it by.

        Raises:
            ReductionError: it is neither.
        """

    @abstractmethod
    def weigh(self, reference: Any) -> list[float | None]:
        """A weight per batch in units of the reference's; None where a batch cannot be put beside it, or was not.

        Raises:
            ReductionError: the loss is no mean of batch and reference.
        """

    @abstractmethod
    def confirm(self, found: Reduction) -> None:
        """Compare the batches' losses and gradients, as they are to be added, with those of all put together.

        Raises:
            ReductionError: they are not the same.
        """


class ByOutputs(Beside):
    """A loss of outputs and targets: slices of both are put into it. A reference is the targets of some samples."""

    def __init__(self, model: nn.Module, graphs: Sequence[CurvatureGraph], batches: Batches, loss: Loss | None) -> None:
        super().__init__(model, graphs, batches, loss)
        graph_of = dict(zip(batches.signatures, graphs, strict=True))
        self.ons = {s: OnOutputs(model, graph_of[s], batch, loss) for s, batch in batches.examples.items()}

    def tell(self) -> Told | None:
        for number, (signature, batch) in enumerate(zip(self.batches.signatures, self.batches, strict=True)):
            on = self.ons[signature]
            every = on.like(batch)
            for first, second in halves(batch.size):
                pieces = on.piece(first, every), on.piece(second, every)
                if (factors := factors_of(on, *pieces, self.tolerance)) is not None:
                    self._check_for_other_outputs(on, *pieces, factors)
                    reference = len(first), [x.cpu() for x in pieces[0].others]
                    parts = [(first, factors[0]), (second, factors[1])]
                    return Told(verdict(factors, self.tolerance), reference, number, parts)
        return None

    def _check_for_other_outputs(
        self, on: OnOutputs, first: Piece, second: Piece, factors: tuple[float, float]
    ) -> None:
        for one, other in ((_scaled(first), second), (first, _scaled(second))):
            again = factors_of(on, one, other, self.tolerance)
            if again is not None and max(abs(a - b) for a, b in zip(factors, again, strict=True)) > self.tolerance:
                raise ReductionError(f"how much a sample counts depends on the model's output, so {ADVICE}")

    def weigh(self, reference: Any) -> list[float | None]:
        weights: list[float | None] = []
        for signature, batch in zip(self.batches.signatures, self.batches, strict=True):
            on = self.ons[signature]
            piece, beside = on.like(batch), _with_outputs_of(on, *reference)
            weights.append(self._weight(on, beside, piece) if _fit(beside, piece, on) else None)
        return weights

    def _weight(self, on: OnOutputs, reference: Piece, piece: Piece) -> float:
        """w / w₀ = 1 / (w₀ / (w₀ + w)) - 1."""
        alone = on.gradients(reference)[1][0]
        if not usable(alone):
            reference = _scaled(reference)
            alone = on.gradients(reference)[1][0]
        if not usable(alone):
            raise ReductionError(NO_GRADIENT)
        found = factors_of(on, reference, piece, self.tolerance)
        if found is None:
            return _weight_of(multiple(on.gradients(reference, piece)[1][0], alone, self.tolerance), self.tolerance)
        verdict(found, self.tolerance)
        return found[1] / found[0]

    def confirm(self, found: Reduction) -> None:
        # Sub-batches may all lie on one side of a threshold or a kink, and what vanishes there may still be curved.
        shares, sizes = found.shares(self.batches.sizes), len(self.batches)
        chosen = set(range(0, sizes, -(-sizes // _MOST)))
        own = [p for module in (self.model, self.loss) if isinstance(module, nn.Module) for p in module.parameters()]
        parameters = [p for p in own if p.requires_grad and p.is_floating_point()]
        on: OnOutputs | None = None
        pieces: list[tuple[int, Piece]] = []
        for number, (batch, graph) in enumerate(zip(self.batches, self.graphs, strict=True)):
            if number in chosen and shares[number]:
                mine = OnOutputs(self.model, graph, batch, self.loss)
                on = on or mine
                if all(_fit(piece, mine.all, on) for _, piece in pieces):
                    pieces.append((number, mine.all))
        if on is None or len(pieces) < 2:
            return
        scale = sum(shares[number] for number, _ in pieces) if found.kind != "sum" else 1.0
        whole = on.derivatives([piece for _, piece in pieces], parameters, [number for number, _ in pieces])
        total, by_parameters = 0.0, [torch.zeros_like(x) for x in whole.parameters]
        for (number, piece), together in zip(pieces, whole.outputs, strict=True):
            alone, share = on.derivatives([piece], parameters, [number]), shares[number] / scale
            total += share * alone.value
            by_parameters = [a + share * b for a, b in zip(by_parameters, alone.parameters, strict=True)]
            check_same(together, [share * x for x in alone.outputs[0]], self.tolerance)
        check_same(whole.parameters, by_parameters, self.tolerance)
        if abs(total - whole.value) > self.tolerance * max(abs(total), abs(whole.value)):
            raise ReductionError(
                f"the batches' losses make {total:.6g} and that of all is {whole.value:.6g}, so {ADVICE}"
            )


def _scaled(piece: Piece) -> Piece:
    """Other outputs for the same targets: smaller ones, which stay probabilities where they are some."""
    return replace(piece, outputs=[0.3 * x if x.is_floating_point() else x for x in piece.outputs])


def _with_outputs_of(on: OnOutputs, count: int, others: list[Tensor]) -> Piece:
    """Targets of ``count`` samples, maybe another rank's, with outputs of one's own: they count the same with those."""
    samples = torch.arange(count, device="cpu") % on.batch.size
    mine = on.piece(samples, on.all)
    return replace(mine, others=[x.to(y.device) for x, y in zip(others, mine.others, strict=True)])


def _fit(one: Piece, other: Piece, on: OnOutputs) -> bool:
    """Whether two pieces can be put together: all axes but the batch's agree."""

    def rest(x: Tensor, batch_axis: BatchAxis | None) -> list[int]:
        return [n for k, n in enumerate(x.shape) if batch_axis is None or k != batch_axis.axis]

    batch_axes = [*on.batch_axes, *on.other_batch_axes]
    pairs = zip([*one.outputs, *one.others], [*other.outputs, *other.others], batch_axes, strict=True)
    return all(rest(x, batch_axis) == rest(y, batch_axis) for x, y, batch_axis in pairs)


def _weight_of(factor: float, tolerance: float) -> float:
    """A weight beside a reference that counts ``factor`` in the whole."""
    return max(1 / factor - 1, 0.0) if factor < 1 - tolerance else 0.0


class ByRuns(Beside):
    """A loss that the model makes itself: it is run, in evaluation mode. A reference is a batch of some samples."""

    exact = False  # weights are solved for

    def tell(self) -> Told | None:
        self.model.eval()
        graph, batch, tolerance = self.graphs[0], next(iter(self.batches.examples.values())), 10 * self.tolerance
        for first, second in halves(batch.size):
            picked = [sub_batch(graph, batch, samples) for samples in (first, second, torch.cat([first, second]))]
            one, two, both = map(self._gradient, picked)
            if usable(one) and usable(two) and usable(both):
                break
        else:
            return None
        factors = _shares(one, two, both, tolerance, same=torch.equal(first, second))
        reference = pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, picked[0].tree)
        return Told(
            verdict(factors, tolerance), (len(first), reference), 0, list(zip((first, second), factors, strict=True))
        )

    def _gradient(self, batch: Batch) -> Tensor:
        return parameter_gradient(self.model, batch, self.loss, self.graphs[0].written)

    def weigh(self, reference: Any) -> list[float | None]:
        self.model.eval()
        size, step = reference[0], -(-len(self.batches) // _MOST_RUNS)
        device = self.batches.device
        args, kwargs, targets = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, reference[1])
        beside = Batch(args, kwargs, targets, size)
        alone: Tensor | None = None
        weights: list[float | None] = []
        for number, batch in enumerate(self.batches):
            whole = put_together(self.graphs[0], [beside, batch]) if number % step == 0 else None
            if whole is not None and alone is None:
                alone = self._gradient(beside)
            weights.append(None if whole is None or alone is None else self._weight(alone, beside, batch, whole))
        return weights

    def _weight(self, alone: Tensor, reference: Batch, batch: Batch, whole: Batch) -> float | None:
        if not usable(alone):
            raise ReductionError(NO_GRADIENT)
        mine, both, tolerance = self._gradient(batch), self._gradient(whole), 10 * self.tolerance
        if not usable(mine):
            return _weight_of(multiple(both, alone, tolerance), tolerance)
        cosine = float(alone @ mine) ** 2 / float((alone @ alone) * (mine @ mine))
        if 1 - cosine < _ALIKE:
            return None
        factors = _shares(alone, mine, both, tolerance, same=False)
        verdict(factors, tolerance)
        return factors[1] / factors[0]

    def confirm(self, found: Reduction) -> None:
        step = -(-len(self.batches) // _MOST_RUNS)
        chosen = [(k, batch) for k, batch in enumerate(self.batches) if k % step == 0]
        whole = put_together(self.graphs[0], [batch for _, batch in chosen])
        if whole is None or len(chosen) < 2:
            return
        shares = found.shares(self.batches.sizes)
        scale = sum(shares[k] for k, _ in chosen) if found.kind != "sum" else 1.0
        terms = [shares[k] / scale * self._gradient(batch) for k, batch in chosen if shares[k]]
        check_same([self._gradient(whole)], [torch.stack(terms).sum(0)], 10 * self.tolerance)


def _shares(one: Tensor, two: Tensor, both: Tensor, tolerance: float, *, same: bool) -> tuple[float, float]:
    """How much two gradients count in that of both batches together.

    Raises:
        ReductionError: it is no sum of multiples of the two.
    """
    if same:
        half = multiple(both, one, tolerance) / 2
        return half, half
    solved = torch.linalg.lstsq(torch.stack([one, two], 1), both.unsqueeze(1)).solution[:, 0]
    first, second = float(solved[0]), float(solved[1])
    multiple(both, first * one + second * two, tolerance)
    return first, second


__all__ = ["NO_GRADIENT", "Beside", "ByOutputs", "ByRuns", "Told"]
