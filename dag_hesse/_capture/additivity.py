"""Finding out how the losses of batches add up: sum, mean, or neither.

It is not read off the loss's code but tried. The loss is evaluated on sub-batches and on the whole of them, by
slicing the model's output and the targets. Where it is a sum over samples of terms ℓ_b over a weight w, its gradient at
sample b's output is ∇ℓ_b / w: on the whole it is that of the sub-batch times w(sub-batch)/w(whole), whatever ℓ is.
Factors of 1 make a sum; factors that add up to 1 make a mean, of which they give the weights (of the samples that
``ignore_index`` leaves, of class weights, of masks). Anything else (contrastive losses, roots of means) has no loss
over batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from dag_hesse._capture.beside import NO_GRADIENT, Beside, ByOutputs, ByRuns, Told
from dag_hesse._capture.denominators import check_read, read_weight
from dag_hesse._capture.factors import weighted
from dag_hesse._capture.losses import Loss
from dag_hesse._capture.reduction import ADVICE, Option, Reduction, given_reduction
from dag_hesse._capture.state import restored
from dag_hesse._capture.stream import Batches
from dag_hesse.errors import DagHesseError, ReductionError
from dag_hesse.ir import CurvatureGraph
from dag_hesse.ranks import Ranks


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
    shared = ranks if ranks is not None and ranks.data is not None else None
    if option is not None:
        return _given(option, batches, shared)
    if shared is None and len(batches) == 1 and not per_sample:
        return Reduction("one batch")
    try:
        with restored(model, loss):
            own = loss is None and next(iter(batches.examples.values())).targets is None
            way = (ByRuns if own else ByOutputs)(model, graphs, batches, loss)
            return _tried(way) if shared is None else _tried_by_all(way, shared)
    except DagHesseError:
        raise
    except Exception as error:
        raise ReductionError(f"the loss cannot be evaluated on sub-batches ({error}), so {ADVICE}") from error


def _given(option: Option, batches: Batches, ranks: Ranks | None) -> Reduction:
    found = given_reduction(option, batches)
    return found if ranks is None else _in_all(found, found.weights or batches.sizes, batches, ranks)


def _tried(way: Beside) -> Reduction:
    told = way.tell()
    if told is None:
        raise ReductionError(NO_GRADIENT)
    if told.kind == "sum":
        found = Reduction("sum")
    elif len(way.batches) == 1:
        return Reduction("mean")
    else:
        found = weighted(_weights(way, told, told, None), way.batches.sizes, way.tolerance)
    way.confirm(found)
    return found


def _tried_by_all(way: Beside, ranks: Ranks) -> Reduction:
    """As :func:`_tried`, where every rank has some of the batches: one rank's reference is put beside all of them."""
    mine = way.tell()
    every = [told for told in ranks.told("a reduction", mine) if told is not None]
    if not every:
        raise ReductionError(NO_GRADIENT)
    if len({told.kind for told in every}) > 1:
        raise ReductionError(f"the loss is a sum on some ranks and a mean on others, so {ADVICE}")
    if every[0].kind == "sum":
        found = Reduction("sum")
    else:
        weights = _weights(way, every[0], mine, ranks)
        if not any(weights):
            raise ReductionError(
                "none of this rank's batches counts: the loss ignores all their targets. Give every rank a batch that "
                "counts."
            )
        found = _in_all(Reduction("weights", tuple(weights)), weights, way.batches, ranks)
    if len(way.batches) > 1:
        way.confirm(found)
    return found


def _in_all(found: Reduction, weights: Sequence[float], batches: Batches, ranks: Ranks) -> Reduction:
    """With the weight of all ranks' batches."""
    kinds = {"sum" if kind == "sum" else "mean" for kind in ranks.told("a kind of reduction", found.kind)}
    if len(kinds) > 1:
        raise ReductionError(f"reduction= is a sum on some ranks and a mean on others, so {ADVICE}")
    if found.kind == "sum":
        return found
    (total,) = ranks.added([torch.tensor([sum(weights)], dtype=torch.float64, device=batches.device)])
    return Reduction("weights", tuple(map(float, weights)), float(total))


def _weights(way: Beside, told: Told, mine: Told | None, ranks: Ranks | None) -> list[float]:
    """A weight per batch, in a unit that all ranks have.

    Either that of the reference, as found beside it, or what graphs divide by, where that agrees with what was found:
    this has no rounding errors, and holds for batches that cannot be put beside others (being of another length, say).

    Raises:
        ReductionError: batches cannot be put beside others, nor can it be read what they count.
    """
    measured = way.weigh(told.reference)
    found = [w for w in measured if w is not None]
    missing = len(found) < len(measured)
    if way.exact and not missing and ranks is None:
        return found
    read, units = list[float](), list[float]()
    try:
        read, units = _read(way, measured, mine)
    except ReductionError:
        if missing:
            raise
    every = [(bool(read), missing, units)] if ranks is None else ranks.told("weights", (bool(read), missing, units))
    known = [unit for _, _, own in every for unit in own]
    agree = known and max(known) - min(known) <= 20 * way.tolerance * max(known)
    if agree and all(can_be_read for can_be_read, *_ in every):
        return read
    if any(lacking for _, lacking, _ in every):
        raise ReductionError(f"the loss divides batches by other numbers than they were found to count, so {ADVICE}")
    return found


def _read(way: Beside, measured: Sequence[float | None], mine: Told | None) -> tuple[list[float], list[float]]:
    """What the batches' graphs divide by, and its unit in the reference's, by every batch that was put beside that."""
    triples = zip(way.graphs, way.batches, measured, strict=True)
    read = [0.0 if w == 0 else read_weight(way.model, graph, batch, way.loss) for graph, batch, w in triples]
    if mine is not None:
        graph, batch = way.graphs[mine.number], next(itertools.islice(way.batches, mine.number, None))
        check_read(way.model, graph, batch, way.loss, mine.parts, 10 * way.tolerance)
    return read, [w / r for w, r in zip(measured, read, strict=True) if w]


__all__ = ["find_reduction"]
