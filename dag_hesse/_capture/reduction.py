"""How the losses of batches add up to the loss over all samples: as a sum, or as a mean with what weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

from torch import Tensor

from dag_hesse._capture.batch import Batch
from dag_hesse._capture.stream import Batches
from dag_hesse.errors import OptionError, takes

REDUCTIONS = ("mean", "sum")
Option = str | Sequence[float] | Callable[[Any], float] | None
ADVICE = (
    "say how the batches' losses add up with reduction='mean' (weighted by samples), 'sum', a weight per batch, or a "
    "callable of a batch; or pass one batch."
)


@dataclass(frozen=True)
class Reduction:
    """``kind``: ``"one batch"``, ``"sum"``, ``"mean"`` (over samples) or ``"weights"`` (a mean with these weights).

    ``whole`` is what all batches weigh, where other ranks have some of them.
    """

    kind: str
    weights: tuple[float, ...] = ()
    whole: float | None = None

    def shares(self, sizes: Sequence[int]) -> list[float]:
        """The factor of every batch's loss in the whole."""
        if self.kind in ("one batch", "sum"):
            return [1.0] * len(sizes)
        weights = self.weights or tuple(map(float, sizes))
        return [weight / (self.whole or sum(weights)) for weight in weights]

    def per_sample(self, sizes: Sequence[int]) -> list[float]:
        """The factor that makes of a sample's term in its batch's loss a loss of its own, with no 1/B."""
        return [share if self.kind == "sum" else share * sum(sizes) for share in self.shares(sizes)]

    def __str__(self) -> str:
        return {"weights": "mean, weighted by batch", "mean": "mean over samples", "sum": "sum over samples"}.get(
            self.kind, self.kind
        )


def given_reduction(option: Option, batches: Batches) -> Reduction:
    """What the user said.

    Raises:
        OptionError: an unknown name, or weights that do not fit.
    """
    if isinstance(option, str):
        if option not in REDUCTIONS:
            raise OptionError(f"reduction={option!r}; expected 'mean', 'sum', a weight per batch, or a callable.")
        return Reduction(option)
    if not callable(option) and not isinstance(option, Sequence):
        raise OptionError(f"reduction={option!r}; expected 'mean', 'sum', a weight per batch, or a callable.")
    if callable(option):
        takes("reduction", option, "batch")
    values: list[Any] = [option(as_given(batch)) for batch in batches] if callable(option) else list(option)
    if len(values) != len(batches):
        raise OptionError(f"reduction has {len(values)} weights for {len(batches)} batches; expected one a batch.")
    if not all(isinstance(x, Real) or (isinstance(x, Tensor) and x.numel() == 1) for x in values):
        raise OptionError(f"reduction gives {values[:4]}; expected a number for each batch.")
    weights = tuple(float(value) for value in values)
    if not all(isfinite(w) and w >= 0 for w in weights) or not sum(weights):
        raise OptionError(f"reduction gives the weights {weights[:4]}; expected finite numbers ≥ 0, not all 0.")
    return Reduction("weights", weights)


def as_given(batch: Batch) -> Any:
    """The batch in the form that users write."""
    if batch.targets is None and not batch.args:
        return batch.kwargs
    if batch.flat:
        return (*batch.args, batch.targets)
    inputs = batch.kwargs or (batch.args[0] if len(batch.args) == 1 else batch.args)
    return inputs, batch.targets


__all__ = ["ADVICE", "REDUCTIONS", "Option", "Reduction", "as_given", "given_reduction"]
