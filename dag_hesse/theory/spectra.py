"""Spectra of the diagonal blocks, and how far they are from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dag_hesse._capture.losses import Loss
from dag_hesse.errors import choose, flag, integer
from dag_hesse.operators import GGNOperator, HessianOperator, TensorOperator
from dag_hesse.operators.block import Submatrix
from dag_hesse.operators.lanczos import quadrature, tridiagonals
from dag_hesse.theory.text import table

Array = NDArray[np.float64]
_DENSE = 1024  # rows of a block up to which its eigenvalues are found
_PARTS = {"full": HessianOperator, "gn": GGNOperator, "tensor": TensorOperator}


@dataclass(frozen=True)
class BlockSpectra:
    """Spectra of n blocks H[v, v] as weighted values: eigenvalues, or the nodes of a quadrature that stands for them.

    Attributes:
        names: the points.
        values: per point, values in ascending order.
        weights: per point, the share of eigenvalues that each value stands for; they add up to 1.
        exact: whether the values are all eigenvalues, (n,).
    """

    names: tuple[str, ...]
    values: tuple[Array, ...]
    weights: tuple[Array, ...]
    exact: NDArray[np.bool_]

    @property
    def scale(self) -> Array:
        """Largest |λ| of every block, (n,)."""
        return np.array([np.abs(x).max(initial=0.0) for x in self.values])

    def distance(self, scaled: bool = True) -> Array:
        """Wasserstein distances ∫|F_v − F_w| between spectra, (n, n).

        Args:
            scaled: divide every spectrum by its largest |λ| first: forms are compared, not sizes. A zero block stays.

        Raises:
            OptionError: ``scaled`` is neither True nor False.
        """
        from scipy.stats import wasserstein_distance  # slow to import

        by = [x or 1.0 for x in self.scale] if flag("scaled", scaled) else [1.0] * len(self.names)
        found = np.zeros((len(by), len(by)))
        for v in range(len(by)):
            for w in range(v):
                spectra = self.values[v] / by[v], self.values[w] / by[w]
                found[v, w] = found[w, v] = wasserstein_distance(*spectra, self.weights[v], self.weights[w])
        return found

    def __str__(self) -> str:
        rows = []
        for name, x, weight in zip(self.names, self.values, self.weights, strict=True):
            mean, negative = float((x * weight).sum()), float(weight[x < 0].sum())
            rows.append((name, float(x.min()), mean, float(x.max()), negative))
        distance = self.distance()
        pairs = [(name, *distance[k].tolist()) for k, name in enumerate(self.names)]
        shapes = table(["block", "λ min", "mean λ", "λ max", "share below 0"], rows)
        return f"{shapes}\n\n{table(['distance', *self.names], pairs)}"


def block_spectra(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    output: str | None = None,
    points: Sequence[str] | str | None = None,
    space: str = "parameter",
    part: str = "full",
    probes: int = 8,
    steps: int = 48,
    seed: int = 0,
) -> BlockSpectra:
    """Spectra of the blocks H[v, v], by which layers of a kind can be told from others.

    Blocks of at most 1024 rows are formed and have all their eigenvalues. The others have a stochastic Lanczos
    quadrature: of random directions, whose nodes and weights have the first 2·``steps`` moments of a sampled
    spectrum. Its extreme nodes are close to the extreme eigenvalues, its weights scatter by about 1/√(probes · rows).

    Args:
        model, batch, loss, output, points, space: as for :class:`dag_hesse.HessianOperator`.
        part: ``"full"``, ``"gn"`` or ``"tensor"``.
        probes, steps: directions and products a direction, where a block is not formed.
        seed: of the directions.

    Returns:
        :class:`BlockSpectra`, in units of the loss per squared unit of the point.

    Raises:
        OptionError: an option has another value than it may have.
        MemoryBudgetError: the basis of one direction does not fit into memory.
        DagHesseError: as :class:`dag_hesse.HessianOperator`.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> found = dh.theory.block_spectra(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), part="gn")
        >>> found.names, [len(x) for x in found.values]
        (('0.weight', '0.bias', '2.weight', '2.bias'), [12, 4, 8, 2])
    """
    choose("part", part, _PARTS)
    probes, steps, seed = integer("probes", probes, 1), integer("steps", steps, 2), integer("seed", seed)
    operator = _PARTS[part](model, batch, loss=loss, output=output, points=points, space=space)
    values, weights, exact = [], [], []
    for number in range(len(operator.form.names)):
        block = Submatrix(operator, [number])
        exact.append(block.shape[0] <= _DENSE)
        if exact[-1]:
            dense = block.dense().double()
            values.append(torch.linalg.eigvalsh(0.5 * (dense + dense.T)).cpu().numpy())
            weights.append(np.full(len(values[-1]), 1.0 / len(values[-1])))
            continue
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randn(probes, block.shape[0], generator=generator, dtype=torch.float64, device="cpu")
        rules = [quadrature(*one) for one in tridiagonals(block, starts, steps, "steps=")]
        nodes, shares = (torch.cat([rule[k] for rule in rules]).numpy() for k in (0, 1))
        order = nodes.argsort()
        values.append(nodes[order])
        weights.append(shares[order] / probes)
    return BlockSpectra(operator.form.names, tuple(values), tuple(weights), np.array(exact))
