"""Spectral densities by stochastic Lanczos quadrature: every product serves the density and its bounds."""

from __future__ import annotations

from math import pi, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dag_hesse.errors import OptionError, integer
from dag_hesse.estimate.norms import lengths
from dag_hesse.operators.eigen import BESIDE

if TYPE_CHECKING:
    from dag_hesse.operators.core import SegmentedOperator


def spectral_density(
    operator: SegmentedOperator,
    ncv: int,
    seed: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 3.0,
    margin: float = 0.05,
    boundaries: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :meth:`dag_hesse.HessianOperator.spectral_density`."""
    num_points, num_repeats = integer("num_points", num_points, 2), integer("num_repeats", num_repeats, 1)
    for name, value, least in (("kappa", kappa, 1.0), ("margin", margin, 0.0)):
        if not (isinstance(value, (int, float)) and least <= value < float("inf")):
            raise OptionError(f"{name}={value!r}; expected a number from {least:g} on.")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randn(num_repeats, operator.shape[0], generator=generator, dtype=torch.float64, device="cpu")
    rules = [quadrature(*one) for one in tridiagonals(operator, starts, ncv, "ncv=")]
    low, high = boundaries or _bounds(rules)
    if not low <= high:
        raise OptionError(f"boundaries={boundaries!r}; expected (lowest, highest).")
    nodes, weights = (torch.cat([rule[k] for rule in rules]) for k in (0, 1))
    room = margin * (high - low) or max(abs(low), 1.0) * margin
    centre, half = (low + high) / 2, (high - low) / 2 + room
    # Bumps of Papyan (2020), §D.2: the narrowest that ncv nodes resolve on [-1, 1].
    width = 2 / (ncv - 1) / sqrt(8 * torch.tensor(float(max(kappa, 1 + 1e-9))).log().item())
    grid = torch.linspace(-1, 1, num_points, dtype=torch.float64)
    bumps = torch.exp(-(((grid[:, None] - (nodes - centre) / half) / width) ** 2) / 2) / (width * sqrt(2 * pi))
    density = bumps @ weights / (num_repeats * half)
    return tuple(x.to(operator.dtype).to(operator.device) for x in (centre + half * grid, density))  # type: ignore[return-value]


def tridiagonals(operator: SegmentedOperator, starts: Tensor, steps: int, option: str) -> list[tuple[Tensor, Tensor]]:
    """Per start (rows), the tridiagonal matrix as (diagonal (m,), off-diagonal (m,)).

    As many starts as their bases have room for go in one product. Vectors are orthogonalized twice against all earlier
    ones, in the operator's own precision, so that no eigenvalue appears twice. m < ``steps`` where the space is
    exhausted; the last off-diagonal is what was left over.

    Raises:
        MemoryBudgetError: one start's basis does not fit; ``option`` is what says how many vectors it has.
    """
    size = (steps + BESIDE) * operator.shape[0] * operator.dtype.itemsize
    operator._check_room(size, f"a basis of {steps} Lanczos vectors", f"take a smaller {option}")
    most, ranks = operator._budget.sweeps // size, operator._together
    if ranks is not None:
        most = ranks.least("room for Lanczos vectors", most)
    groups = starts.to(operator.device).split(max(1, most))
    return [one for group in groups for one in _reduced(operator, group, steps)]


def _reduced(operator: SegmentedOperator, starts: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """All starts at once."""
    v = (starts / starts.norm(dim=1, keepdim=True)).to(operator.dtype)
    basis, sizes = v.new_empty(len(v), steps + 1, v.shape[1]), list(operator.form.sizes)
    basis[:, 0] = v
    alphas, betas = [], []
    for step in range(steps):
        w = torch.cat(operator._products(list(v.split(sizes, dim=1))), dim=1)
        alphas.append((v * w).sum(1).double())
        known = basis[:, : step + 1]
        for _ in range(2):
            w = w - (known @ w.unsqueeze(2)).mT.bmm(known).squeeze(1)
        betas.append(lengths(w))
        scale = torch.stack(alphas).abs().amax(0) + torch.stack(betas).amax(0)
        over = betas[-1] <= 10 * torch.finfo(operator.dtype).eps * scale
        if bool(over.all()):
            break
        v = torch.where(over[:, None], torch.zeros_like(w), w / betas[-1].to(w.dtype)[:, None])
        basis[:, step + 1] = v
    a, b = torch.stack(alphas, dim=1).cpu(), torch.stack(betas, dim=1).cpu()
    return [(a[k, :m], b[k, :m]) for k in range(len(a)) for m in [_length(b[k])]]


def _length(betas: Tensor) -> int:
    """Steps until a start's space was exhausted: from there on its vectors are zero."""
    return int((betas > 0).long().cumprod(0).sum().clamp(max=len(betas) - 1)) + 1


def quadrature(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nodes, weights, what each node may be off by)."""
    matrix = torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2, betas[-1] * vectors[-1].abs()


def _bounds(rules: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """The outermost nodes, widened by their residuals."""
    low = min(float(nodes[0] - off[0]) for nodes, _, off in rules)
    return low, max(float(nodes[-1] + off[-1]) for nodes, _, off in rules)
