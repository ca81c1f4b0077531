"""What the experiments measure, as flat dictionaries of numbers: ``{"R 3": 0.085, …}``, a trailing number a distance.

Models and batches are taken to float64, and maps are exact unless said otherwise.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dag_hesse._analyze import analyze
from dag_hesse.report import CurvatureReport
from dag_hesse.theory import activation_curvature, resonance_bounds
from dag_hesse.theory.passes import dense_jacobians
from dag_hesse.theory.scene import pose

Batch = tuple[Tensor, Tensor]
Values = dict[str, float]


def in_double(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """A copy of the model for evaluation, and the batch, in float64; integers stay."""
    x, y = (each.double() if each.is_floating_point() else each for each in batch)
    return copy.deepcopy(model).double().eval(), (x, y)


def exact_map(model: nn.Module, batch: Batch, points: Sequence[str] | str, **options: Any) -> CurvatureReport:
    """The map of a batch, in float64 and without probes unless ``options`` say so."""
    model, batch = in_double(model, batch)
    return analyze(model, batch, points=points, progress=False, **{"mode": "exact", **options})


def by_distance(report: CurvatureReport) -> dict[int, tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Unordered pairs at each distance, as indices into maps."""
    rows, columns = np.triu_indices(len(report))
    apart = report.distance[rows, columns]
    return {int(d): (rows[apart == d], columns[apart == d]) for d in np.unique(apart[apart >= 0])}


def resonance(report: CurvatureReport) -> Values:
    """R̄(d), C̄(d) and D̄(d): means over the pairs at distance d (§5.1); NaN, where a block is zero, is left out."""
    found: Values = {}
    for d, pairs in by_distance(report).items():
        for name, metric in (("R", "resonance"), ("C", "coupling"), ("D", "stable_rank")):
            values = report[metric][pairs]
            known = values[~np.isnan(values)]
            found[f"{name} {d}"] = float(known.mean()) if known.size else float("nan")
    return found


def gaps(report: CurvatureReport) -> Values:
    """Σ‖H_T‖_F, Σ‖H_GN‖_F and their ratio over the pairs at each distance, and the ratio over all pairs (§5.3).

    The published gaps are ratios of sums, and the published norms sums over pairs: a mean of ratios is another number.
    """
    found: Values = {}
    whole = np.zeros(2)
    for d, pairs in by_distance(report).items():
        sums = np.array([report.tensor_norm[pairs].sum(), report.gn_norm[pairs].sum()])
        whole += sums
        found |= {f"T {d}": float(sums[0]), f"GN {d}": float(sums[1]), f"gap {d}": _ratio(*sums)}
    return found | {"gap": _ratio(*whole)}


def pair_gap(report: CurvatureReport, v: str, w: str) -> Values:
    """The norms of one block and its gap (Tables 6 and 7)."""
    i, j = report.index(v), report.index(w)
    maps = {"full": report.resonance, "GN": report.gn_norm, "T": report.tensor_norm}
    found = {name: float(values[i, j]) for name, values in maps.items()}
    return found | {"gap": _ratio(found["T"], found["GN"])}


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else 0.0 if above == 0 else float("inf")


def step_jacobians(
    model: nn.Module, batch: Batch, steps: Sequence[tuple[str, str]], points: Sequence[str]
) -> list[Tensor]:
    """J[w←v] of every sample, (samples, d_w, d_v), for pairs (v, w); paths may pass other points."""
    model, batch = in_double(model, batch)
    scene = pose(model, batch, points=points)
    found: dict[tuple[str, str], Tensor] = {}
    for entry, lin in scene.linearizations():
        named = {point.name: point for point in entry.points}
        for w in {w for _, w in steps}:
            sources = [named[v] for v, target in steps if target == w]
            made = dense_jacobians(lin, entry.groups, named[w], sources)
            found |= {(v.name, w): made[v.name] for v in sources}
    return [found[step] for step in steps]


def chain(model: nn.Module) -> list[str]:
    """Points of a chain of blocks: the projection, whose output the first block takes, and the blocks."""
    return ["projection", *(f"blocks.{k}" for k in range(len(model.blocks)))]  # type: ignore[arg-type]


def growth(model: nn.Module, batch: Batch) -> Values:
    """Norms of the blocks' Jacobians, and growth rates along the whole chain of L blocks (§5.1; eq. 8).

    Returns:
        ``rho``: the largest over blocks of ‖J‖₂ averaged over samples, which is what the paper tabulates as ρ_max;
        ``rho mean``: the mean over blocks; ``rho sample``: the largest of any block and sample (Corollary 26's ρ);
        ``lambda``: λ₁ of eq. (8), log‖J_L ⋯ J_1‖₂ / L, a mean over samples;
        ``lambda typical``: the same of ‖·‖_F/√d, the root mean square over directions;
        ``lambda published``: the largest over columns of the mean over samples of log|R_kk| / L, where QR is that of
        J_L ⋯ J_1: the growth of fixed directions, which is what the authors' code tabulates as λ₁.
    """
    names = chain(model)
    steps = [*itertools.pairwise(names), (names[0], names[-1])]
    *blocks, whole = step_jacobians(model, batch, steps, names)
    norms = torch.stack([torch.linalg.matrix_norm(block, 2) for block in blocks])
    count, width = len(blocks), whole.shape[-1]
    columns = torch.linalg.qr(whole).R.diagonal(dim1=-2, dim2=-1).abs().clamp(min=1e-300)
    return {
        "rho": float(norms.mean(1).max()),
        "rho mean": float(norms.mean()),
        "rho sample": float(norms.max()),
        "lambda": float(torch.linalg.matrix_norm(whole, 2).log().mean()) / count,
        "lambda typical": float((torch.linalg.matrix_norm(whole) / width**0.5).log().mean()) / count,
        "lambda published": float(columns.log().mean(0).max()) / count,
    }


def bound(model: nn.Module, batch: Batch) -> Values:
    """Corollary 26's bound (10) on every pair of blocks and sample: where it holds, and the least slack.

    Returns:
        ``rate``: the largest sρ of a sample; ``applies``: the share of pairs and samples with sρ < 1;
        ``holds``: the share of those within the bound; ``slack``: the least bound / measured among them.
    """
    model, batch = in_double(model, batch)
    found = resonance_bounds(model, batch, points=chain(model)[1:])
    upper = np.triu_indices(len(found.names) - 1)
    some, held, slack = (
        a[upper] for a in (found.global_rate.applies, found.global_rate.holds, found.global_rate.slack)
    )
    return {
        "rate": float(found.rate.max()),
        "applies": float(some.mean()),
        "holds": float(held[some].mean()) if some.any() else float("nan"),
        "slack": float(np.nanmin(slack[some])) if some.any() else float("nan"),
    }


def curvature(model: nn.Module, batch: Batch) -> Values:
    """E[σ″(z)²] over all activations, samples and units (Tables 4 and 5); all layers have as many units."""
    model, batch = in_double(model, batch)
    return {"curvature": float(activation_curvature(model, batch).mean_square.mean())}
