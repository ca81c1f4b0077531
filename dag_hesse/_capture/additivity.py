"""Finding out how the losses of batches add up: sum, mean, or neither.

It is not read off the loss's code but tried. The loss is evaluated on sub-batches and on the whole of them, by
slicing the model's output and the targets. Where it is a sum over samples of terms ℓ_b over a weight w, its gradient at
sample b's output is ∇ℓ_b / w: on the whole it is that of the sub-batch times w(sub-batch)/w(whole), whatever ℓ is.
Factors of 1 make a sum; factors that add up to 1 make a mean, of which they give the weights (of the samples that
``ignore_index`` leaves, of class weights, of masks). Anything else (contrastive losses, roots of means) has no loss
over batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dag_hesse._capture.factors import (
    check_same,
    denominator,
    factors_of,
    halves,
    multiple,
    tolerance_of,
    usable,
    verdict,
    weighted,
)
from dag_hesse._capture.losses import Loss
from dag_hesse._capture.reduction import ADVICE, Option, Reduction, given_reduction
from dag_hesse._capture.state import restored
from dag_hesse._capture.stream import Batches
from dag_hesse._capture.sub_batches import OnOutputs, Piece, parameter_gradient, put_together, sub_batch
from dag_hesse.errors import DagHesseError, ReductionError
from dag_hesse.ir import BatchAxis, CurvatureGraph
from dag_hesse.ranks import Ranks

_MOST = 32  # batches whose outputs are put together to be looked at
_MOST_RUNS = 8  # that a model is run on


def find_reduction(
    model: nn.Module,
    graphs: Sequence[CurvatureGraph],
    batches: Batches,
    loss: Loss | None,
    option: Option = None,
    *,
    per_sample: bool = False,
    ranks: Ranks | None = None,
) -> Reduction:
    """How the losses of all batches add up.

    Args:
        model, graphs, batches, loss: as captured, a graph per batch.
        option: what the user said; None: it is tried on the loss itself.
        per_sample: whether it matters for a single batch as well.
        ranks: those that have other batches of the same loss, if there are any.

    Raises:
        ReductionError: the losses of sub-batches do not make up that of the whole, or ranks have other kinds of losses.
        OptionError: ``option`` is not among its choices.
    """
    if ranks is not None and ranks.data is not None:
        return _shared(model, graphs, batches, loss, option, ranks)
    if option is not None:
        return given_reduction(option, batches)
    if len(batches) == 1 and not per_sample:
        return Reduction("one batch")
    try:
        with restored(model, loss):
            own = loss is None and next(iter(batches.examples.values())).targets is None
            return (_by_runs if own else _by_outputs)(model, graphs, batches, loss)
    except DagHesseError:
        raise
    except Exception as error:
        raise ReductionError(f"the loss cannot be evaluated on sub-batches ({error}), so {ADVICE}") from error


def _shared(
    model: nn.Module,
    graphs: Sequence[CurvatureGraph],
    batches: Batches,
    loss: Loss | None,
    option: Option,
    ranks: Ranks,
) -> Reduction:
    """As :func:`find_reduction`, where every rank has some of the batches; arguments as there.

    Raises:
        ReductionError: weights cannot be read off the loss, or ranks have other kinds of losses.
    """
    found = find_reduction(model, graphs, batches, loss, option, per_sample=True)
    weights = found.weights or tuple(map(float, batches.sizes))
    if option is None and found.kind != "sum":  # in a unit that all ranks have
        weights = tuple(denominator(graph, batch) for graph, batch in zip(graphs, batches, strict=True))
    kinds = {"sum" if kind == "sum" else "mean" for kind in ranks.told("a reduction", found.kind)}
    if len(kinds) > 1:
        raise ReductionError(f"the loss is a sum on some ranks and a mean on others, so {ADVICE}")
    if found.kind == "sum":
        return found
    (total,) = ranks.added([torch.tensor([sum(weights)], dtype=torch.float64, device=batches.device)])
    return Reduction("weights", weights, float(total))


def _by_outputs(model: nn.Module, graphs: Sequence[CurvatureGraph], batches: Batches, loss: Loss | None) -> Reduction:
    tolerance = tolerance_of(graphs[0])
    ons = _examples(model, graphs, batches, loss)
    on, first, second, factors = _telling(ons, batches, tolerance)
    for one, other in ((_scaled(first), second), (first, _scaled(second))):
        again = factors_of(on, one, other, tolerance)
        if again is not None and max(abs(a - b) for a, b in zip(factors, again, strict=True)) > tolerance:
            raise ReductionError(f"how much a sample counts depends on the model's output, so {ADVICE}")
    if verdict(factors, tolerance) == "sum":
        found = Reduction("sum")
    elif len(batches) == 1:
        return Reduction("mean")
    else:
        found = weighted(_links(graphs, ons, first, batches, tolerance), batches.sizes, tolerance)
    _confirm(found, model, graphs, batches, loss, tolerance)
    return found


def _confirm(
    found: Reduction,
    model: nn.Module,
    graphs: Sequence[CurvatureGraph],
    batches: Batches,
    loss: Loss | None,
    tolerance: float,
) -> None:
    """Compare the batches' losses, gradients and curvature, as they are to be added, with those of all put together.

    Sub-batches may all lie on one side of a threshold or a kink, and what vanishes there may still be curved.

    Raises:
        ReductionError: they are not the same.
    """
    chosen = set(range(0, len(batches), -(-len(batches) // _MOST)))
    shares = found.shares(batches.sizes)
    own = [p for module in (model, loss) if isinstance(module, nn.Module) for p in module.parameters()]
    parameters = [p for p in own if p.requires_grad and p.is_floating_point()]
    on: OnOutputs | None = None
    pieces: list[tuple[int, Piece]] = []
    for number, (batch, graph) in enumerate(zip(batches, graphs, strict=True)):
        if number in chosen and shares[number]:
            mine = OnOutputs(model, graph, batch, loss)
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
        check_same(together, [share * x for x in alone.outputs[0]], tolerance)
    check_same(whole.parameters, by_parameters, tolerance)
    if abs(total - whole.value) > tolerance * max(abs(total), abs(whole.value)):
        raise ReductionError(f"the batches' losses make {total:.6g} and that of all is {whole.value:.6g}, so {ADVICE}")


def _scaled(piece: Piece) -> Piece:
    """Other outputs for the same targets: smaller ones, which stay probabilities where they are some."""
    return replace(piece, outputs=[0.3 * x if x.is_floating_point() else x for x in piece.outputs])


def _telling(
    ons: dict[Any, OnOutputs], batches: Batches, tolerance: float
) -> tuple[OnOutputs, Piece, Piece, tuple[float, float]]:
    """The first batch, and two sub-batches of it, that have gradients; and how much these count together."""
    for signature, batch in zip(batches.signatures, batches, strict=True):
        on = ons[signature]
        every = on.like(batch)
        for first, second in halves(batch.size):
            pieces = on.piece(first, every), on.piece(second, every)
            if (factors := factors_of(on, *pieces, tolerance)) is not None:
                return on, *pieces, factors
    raise ReductionError(f"the loss has no gradient at the model's output to tell it by, so {ADVICE}")


def _examples(
    model: nn.Module, graphs: Sequence[CurvatureGraph], batches: Batches, loss: Loss | None
) -> dict[Any, OnOutputs]:
    by_signature = dict(zip(batches.signatures, graphs, strict=True))
    return {s: OnOutputs(model, by_signature[s], batch, loss) for s, batch in batches.examples.items()}


def _links(
    graphs: Sequence[CurvatureGraph],
    ons: dict[Any, OnOutputs],
    reference: Piece,
    batches: Batches,
    tolerance: float,
) -> list[float]:
    """A weight per batch: each is put beside one reference, with the outputs of the example that it is like.

    What does not fit beside it (of another length, say) has the weight that its own graph divides by.
    """
    weights: list[float] = []
    unit = 0.0  # the reference's weight, in which those of others are found, where graphs are to be read
    for signature, batch, graph in zip(batches.signatures, batches, graphs, strict=True):
        on = ons[signature]
        piece = on.like(batch)
        if _fit(reference, piece, on):
            weights.append(_beside(on, reference, piece, tolerance))
            if weights[-1] and not unit and _ragged(reference, ons):
                unit = denominator(graph, batch) / weights[-1]
        else:
            weights.append(-denominator(graph, batch))
    return [-w if w < 0 else w * (unit or 1.0) for w in weights]


def _ragged(reference: Piece, ons: dict[Any, OnOutputs]) -> bool:
    return not all(_fit(reference, on.all, on) for on in ons.values())


def _beside(on: OnOutputs, reference: Piece, piece: Piece, tolerance: float) -> float:
    """The weight of a piece in units of the reference's: w / w₀ = 1 / (w₀ / (w₀ + w)) - 1."""
    alone, both = on.gradients(reference)[1][0], on.gradients(reference, piece)[1][0]
    factor = multiple(both, alone, tolerance)
    found = factors_of(on, reference, piece, tolerance)
    if found is not None:
        verdict(found, tolerance)
        return found[1] / found[0]
    return max(1 / factor - 1, 0.0) if factor < 1 - tolerance else 0.0


def _fit(one: Piece, other: Piece, on: OnOutputs) -> bool:
    """Whether two pieces can be put together: all axes but the batch's agree."""

    def rest(x: Tensor, batch_axis: BatchAxis | None) -> list[int]:
        return [n for k, n in enumerate(x.shape) if batch_axis is None or k != batch_axis.axis]

    batch_axes = [*on.batch_axes, *on.other_batch_axes]
    pairs = zip([*one.outputs, *one.others], [*other.outputs, *other.others], batch_axes, strict=True)
    return all(rest(x, batch_axis) == rest(y, batch_axis) for x, y, batch_axis in pairs)


def _by_runs(model: nn.Module, graphs: Sequence[CurvatureGraph], batches: Batches, loss: Loss | None) -> Reduction:
    """The model is run on sub-batches of the first batch, in evaluation mode: its gradients tell what counts."""
    tolerance, batch = tolerance_of(graphs[0]), next(iter(batches.examples.values()))
    model.eval()
    for first, second in halves(batch.size):
        samples = first, second, torch.cat([first, second])
        one, two, both = (
            parameter_gradient(model, sub_batch(graphs[0], batch, picked), loss, graphs[0].written)
            for picked in samples
        )
        if usable(one) and usable(two) and usable(both):
            break
    else:
        raise ReductionError(f"the loss has no gradient on sub-batches of the first batch to tell it by, so {ADVICE}")
    if torch.equal(first, second):
        factors = (multiple(both, one, tolerance) / 2,) * 2
    else:
        solved = torch.linalg.lstsq(torch.stack([one, two], 1), both.unsqueeze(1)).solution[:, 0]
        factors = float(solved[0]), float(solved[1])
        multiple(both, factors[0] * one + factors[1] * two, 10 * tolerance)
    if verdict(factors, 10 * tolerance) == "sum":
        found = Reduction("sum")
    elif len(batches) == 1:
        return Reduction("mean")
    else:
        weights = [denominator(g, b) for g, b in zip(graphs, batches, strict=True)]
        found = weighted(weights, batches.sizes, tolerance)
    _confirm_runs(found, model, graphs, batches, loss, 10 * tolerance)
    return found


def _confirm_runs(
    found: Reduction,
    model: nn.Module,
    graphs: Sequence[CurvatureGraph],
    batches: Batches,
    loss: Loss | None,
    tolerance: float,
) -> None:
    """:func:`_confirm` for a loss that the model makes itself: some batches are run one by one, and together."""
    step = -(-len(batches) // _MOST_RUNS)
    chosen = [(k, batch) for k, batch in enumerate(batches) if k % step == 0]
    whole = put_together(graphs[0], [batch for _, batch in chosen])
    if whole is None or len(chosen) < 2:
        return
    shares, written = found.shares(batches.sizes), graphs[0].written
    scale = sum(shares[k] for k, _ in chosen) if found.kind != "sum" else 1.0
    terms = [shares[k] / scale * parameter_gradient(model, batch, loss, written) for k, batch in chosen if shares[k]]
    check_same([parameter_gradient(model, whole, loss, written)], [torch.stack(terms).sum(0)], tolerance)


__all__ = ["find_reduction"]
