"""Spectra of the diagonal blocks, and how far they are from each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dag_hesse._capture.losses import Loss
from dag_hesse.errors import choose, flag, integer
from dag_hesse.operators import GGNOperator, HessianOperator, TensorOperator
from dag_hesse.theory.spectral import tridiagonal
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
    for name in operator.form.names:
        block = operator.block(name, name)
        exact.append(block.shape[0] <= _DENSE)
        if exact[-1]:
            dense = block.dense().double()
            values.append(torch.linalg.eigvalsh(0.5 * (dense + dense.T)).cpu().numpy())
            weights.append(np.full(len(values[-1]), 1.0 / len(values[-1])))
            continue
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(block.shape[0], probes, generator=generator, dtype=torch.float64, device="cpu")
        product = _product(block.__matmul__, block.dtype)
        nodes, shares = quadrature(product, start.to(block.device), steps)
        values.append(nodes)
        weights.append(shares)
    return BlockSpectra(operator.form.names, tuple(values), tuple(weights), np.array(exact))


def _product(multiply: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A product of columns in float64 with what multiplies in another type."""
    return lambda x: multiply(x.to(dtype)).double()


def quadrature(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Array, Array]:
    """Nodes in ascending order and weights of a symmetric matrix's spectrum, from columns (n, probes)."""
    rows, probes = start.shape
    basis, diagonal, beside = [start / start.norm(dim=0)], list[Tensor](), list[Tensor]()
    largest = torch.zeros(probes, dtype=start.dtype, device=start.device)
    for _ in range(min(steps, rows)):
        x = product(basis[-1])
        largest = torch.maximum(largest, x.norm(dim=0))
        diagonal.append((x * basis[-1]).sum(0))
        stacked = torch.stack(basis)  # (step, n, probes)
        for _ in range(2):  # once leaves what rounding put back
            x = x - torch.einsum("knp,kp->np", stacked, torch.einsum("knp,np->kp", stacked, x))
        size = x.norm(dim=0)
        alive = size > rows * torch.finfo(start.dtype).eps * largest
        beside.append(torch.where(alive, size, torch.zeros_like(size)))
        if not bool(alive.any()):
            break
        basis.append(torch.where(alive, x / size.clamp_min(1e-300), torch.zeros_like(x)))
    nodes, vectors = torch.linalg.eigh(tridiagonal(diagonal, beside[: len(diagonal) - 1]))
    shares = vectors[:, 0, :].pow(2) / probes
    order = nodes.flatten().argsort()
    return nodes.flatten()[order].cpu().numpy(), shares.flatten()[order].cpu().numpy()
