"""How much sub-batches count in a whole: their gradients beside those of the loss over both, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dag_hesse._capture.reduction import ADVICE, Reduction
from dag_hesse._capture.sub_batches import OnOutputs, Piece
from dag_hesse.errors import ReductionError
from dag_hesse.ir import CurvatureGraph


def tolerance_of(graph: CurvatureGraph) -> float:
    """Relative, for the loss's dtype."""
    return float(torch.finfo(graph.nodes[graph.loss].dtype).eps ** 0.5)


def multiple(whole: Tensor, alone: Tensor, tolerance: float) -> float:
    """The number that ``whole`` is of ``alone``.

    Raises:
        ReductionError: it is no multiple.
    """
    factor = float(whole @ alone / (alone @ alone))
    if float((whole - factor * alone).norm()) > tolerance * max(float(whole.norm()), float(alone.norm())):
        raise ReductionError(f"one sample's loss depends on the other samples' outputs, so {ADVICE}")
    return factor


def usable(gradient: Tensor) -> bool:
    """Whether something can be told by it."""
    return bool(gradient.isfinite().all()) and bool(gradient.any())


def halves(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ways to halve a batch, and last the batch beside itself."""
    every = torch.arange(size, device="cpu")
    for cut in dict.fromkeys((-(-size // 3), size // 2)):
        if 0 < cut < size:
            yield every[:cut], every[cut:]
            yield every[size - cut :], every[: size - cut]
    if size > 2:
        yield every[::2], every[1::2]
    yield every, every


def factors_of(on: OnOutputs, first: Piece, second: Piece, tolerance: float) -> tuple[float, float] | None:
    """w(first) and w(second) over w(both); None where one of them has no gradient to tell it by."""
    (one, alone), (two, beside) = on.gradients(first), on.gradients(second)
    if not (usable(alone[0]) and usable(beside[0])):
        return None
    both, within = on.gradients(first, second)
    factors = multiple(within[0], alone[0], tolerance), multiple(within[1], beside[0], tolerance)
    if min(map(abs, factors)) <= tolerance:
        raise ReductionError(f"samples that have a loss of their own count nothing beside others, so {ADVICE}")
    expected = factors[0] * one + factors[1] * two
    if abs(both - expected) > tolerance * max(abs(both), abs(factors[0] * one), abs(factors[1] * two)):
        raise ReductionError(
            f"the losses of two sub-batches make {expected:.6g} and their whole's is {both:.6g}, so {ADVICE}"
        )
    return factors


def verdict(factors: tuple[float, float], tolerance: float) -> str:
    """``"sum"`` or ``"mean"``.

    Raises:
        ReductionError: neither.
    """
    if all(abs(f - 1) <= tolerance for f in factors):
        return "sum"
    if abs(sum(factors) - 1) <= tolerance and min(factors) >= -tolerance:
        return "mean"
    raise ReductionError(
        f"the loss is neither a sum nor a mean over samples (sub-batches count {factors[0]:.4g} and "
        f"{factors[1]:.4g} times in the whole), so {ADVICE}"
    )


def weighted(weights: list[float], sizes: Sequence[int], tolerance: float) -> Reduction:
    """Plain means are called so."""
    scale = sum(weights) / sum(sizes)
    if all(abs(w - scale * n) <= tolerance * scale * n for w, n in zip(weights, sizes, strict=True)):
        return Reduction("mean")
    return Reduction("weights", tuple(weights))


def check_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Compare slopes and curvatures.

    Raises:
        ReductionError: they differ.
    """
    for what, x, y in zip(("slope", "curvature"), found, expected, strict=False):
        if float((x - y).norm()) > tolerance * max(float(x.norm()), float(y.norm()), tolerance):
            raise ReductionError(f"the loss of all batches has another {what} than theirs added up, so {ADVICE}")


__all__ = [
    "check_same",
    "factors_of",
    "halves",
    "multiple",
    "tolerance_of",
    "usable",
    "verdict",
    "weighted",
]
