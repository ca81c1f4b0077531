"""What estimators hand over: norms of a pair's block, per group of samples, with the probes' pseudo-values."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def lengths(x: Tensor) -> Tensor:
    """‖x‖ along the last axis, (…,) in float64: squares of float32 numbers may be too large for it, or too small.

    >>> round(lengths(torch.tensor([3e30, 4e30])).item() / 5e30, 6), lengths(torch.zeros(2, 3)).tolist()
    (1.0, [0.0, 0.0])
    """
    largest = x.abs().amax(-1)
    unit = x / torch.where(largest > 0, largest, 1.0).unsqueeze(-1)
    return unit.norm(dim=-1).double() * largest.double()


def unit(x: Tensor, length: Tensor) -> Tensor:
    """x over its length; 0 stays 0."""
    return x / length.to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny).unsqueeze(-1)


def leading(products: Tensor) -> Tensor:
    """Leading left singular vector of the products (probes, groups, d), times its singular value: (groups, d)."""
    y = products.transpose(0, 1)  # (groups, probes, d)
    size = y.abs().amax((1, 2))
    y = unit(y, size.unsqueeze(1))
    _, vectors = torch.linalg.eigh((y @ y.mT).double())
    return (vectors[..., -1:].to(y.dtype).mT @ y).squeeze(1) * size.unsqueeze(-1)


PARTS = ("full", "gn", "tensor")


@dataclass(frozen=True)
class Norm:
    """A norm of one block, aggregated over groups.

    Attributes:
        value: the norm.
        pseudo_values: the jackknife's, (probes,), whose mean is ``value``; None where it is exact.
        source: which point's probes ``pseudo_values`` belong to (those of one source are correlated).
    """

    value: float
    pseudo_values: Array | None = None
    source: int = -1

    @property
    def stderr(self) -> float:
        """Standard error; 0.0 where exact."""
        if self.pseudo_values is None:
            return 0.0
        return float(self.pseudo_values.std(ddof=1) / np.sqrt(len(self.pseudo_values)))


@dataclass
class NormTable:
    """Frobenius norms of the parts of each unordered pair, and the full block's spectral norm per group.

    ``batch_mode`` fixes how groups (samples) are put together: ``per_sample`` averages norms, ``joint`` takes the norm
    of the block-diagonal whole; ``shared`` has one group.
    """

    batch_mode: str
    frobenius: dict[str, dict[tuple[int, int], Norm]] = field(default_factory=lambda: {part: {} for part in PARTS})
    spectral: dict[tuple[int, int], tuple[Array, Array]] = field(default_factory=dict)  # (values, errors) per group
    squares: dict[tuple[int, int], Array] = field(default_factory=dict)  # ‖H_g‖_F² per group, of the full block

    def aggregate(self, squares: Array) -> Array:
        """Norm of the whole from squared Frobenius norms (…, groups) -> (…)."""
        squares = np.maximum(squares, 0.0)
        if self.batch_mode == "per_sample":
            return np.sqrt(squares).mean(-1)
        return np.sqrt(squares.sum(-1))

    def set_exact(self, part: str, pair: tuple[int, int], squares: Array) -> None:
        """Enter exact squared norms per group."""
        self.frobenius[part][pair] = Norm(float(self.aggregate(squares)))
        if part == "full":
            self.squares[pair] = squares

    def set_sampled(self, part: str, pair: tuple[int, int], samples: Array, source: int) -> None:
        """Enter per-probe estimates ‖H_g z_i‖² (probes, groups); the jackknife removes the bias of the root."""
        count = len(samples)
        mean = samples.mean(0)
        whole = self.aggregate(mean)
        if count < 2 or whole == 0.0:
            self.frobenius[part][pair] = Norm(float(whole), np.full(max(count, 2), whole), source)
        else:
            without = self.aggregate((mean * count - samples) / (count - 1))
            pseudo_values = count * whole - (count - 1) * without
            self.frobenius[part][pair] = Norm(float(max(pseudo_values.mean(), 0.0)), pseudo_values, source)
        if part == "full":
            self.squares[pair] = np.maximum(mean, 0.0)
