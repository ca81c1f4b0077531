"""From norms to the paper's metrics (design §2.5), with standard errors by the delta method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dag_hesse.estimate.norms import Array, Norm, NormTable
from dag_hesse.plan import Method, Plan
from dag_hesse.plan.data import Methods

METRICS = ("resonance", "coupling", "stable_rank", "gn_gap", "gn_norm", "tensor_norm")
_WITHOUT = 1e-30  # keeps the GN-gap of a block without GN part finite
_RANK = {method: rank for rank, method in enumerate(Method)}


@dataclass(frozen=True)
class Metrics:
    """n×n arrays by metric name: values, standard errors (0.0 where exact), and names of methods."""

    values: dict[str, Array]
    stderr: dict[str, Array]
    method: dict[str, NDArray[np.str_]]


def _relative_error(terms: Sequence[tuple[Norm, float]]) -> float:
    """Relative standard error of Π normᵖ: terms from the same source share their probes, others are independent."""
    by_source: dict[int, Array] = {}
    for norm, power in terms:
        if norm.pseudo_values is None or norm.value == 0.0:
            continue
        deviation = power * (norm.pseudo_values - norm.value) / norm.value
        held = by_source.get(norm.source)
        by_source[norm.source] = deviation if held is None or len(held) != len(deviation) else held + deviation
    variances = (d.var(ddof=1) / len(d) for d in by_source.values())
    return float(np.sqrt(sum(variances)))


def _stable_rank(table: NormTable, pair: tuple[int, int], resonance: Norm) -> tuple[float, float]:
    squares = table.squares[pair]
    spectral, error = table.spectral[pair]
    some = spectral > 0
    if not some.any():  # zero by proof or measured as zero; NaN where it was not asked for
        return float("nan"), float("nan") if np.isnan(spectral).any() else 0.0
    if table.batch_mode == "per_sample":
        value = float((squares[some] / spectral[some] ** 2).mean())
        off = float((np.broadcast_to(error, spectral.shape)[some] / spectral[some]).mean())
    else:
        top = int(spectral.argmax())
        value, off = (
            float(squares.sum() / spectral[top] ** 2),
            float(np.broadcast_to(error, spectral.shape)[top] / spectral[top]),
        )
    norm_part = 2 * resonance.stderr / resonance.value if resonance.value else 0.0
    return value, value * float(np.hypot(norm_part, 2 * off))


def assemble(table: NormTable, plan: Plan) -> Metrics:
    """Compute every metric of every pair."""
    count = len(plan.structure.names)
    values = {name: np.zeros((count, count)) for name in METRICS}
    stderr = {name: np.zeros((count, count)) for name in METRICS}

    def put(name: str, v: int, w: int, value: float, error: float) -> None:
        for i, j in ((v, w), (w, v)):
            values[name][i, j], stderr[name][i, j] = value, error

    for v in range(count):
        for w in range(v, count):
            full, gn, tensor = (table.frobenius[part][v, w] for part in ("full", "gn", "tensor"))
            put("resonance", v, w, full.value, full.stderr)
            put("gn_norm", v, w, gn.value, gn.stderr)
            put("tensor_norm", v, w, tensor.value, tensor.stderr)
            gap = tensor.value / (gn.value or _WITHOUT) if tensor.value else 0.0
            put("gn_gap", v, w, gap, gap * _relative_error([(tensor, 1.0), (gn, -1.0)]))
            put("stable_rank", v, w, *_stable_rank(table, (v, w), full))
            ends = [table.frobenius["full"][v, v], table.frobenius["full"][w, w]]
            scale = float(np.sqrt(ends[0].value * ends[1].value))
            coupling = 1.0 if v == w and full.value > 0 else full.value / scale if scale else float("nan")
            off = 0.0 if v == w else _relative_error([(full, 1.0), (ends[0], -0.5), (ends[1], -0.5)])
            put("coupling", v, w, coupling, coupling * off if scale else 0.0)
    return Metrics(values, stderr, _methods(plan))


def _worst(*methods: Methods) -> Methods:
    """Elementwise the least exact of the methods."""
    ranks = np.stack([np.vectorize(_RANK.__getitem__)(m) for m in methods])
    return np.array(list(Method), dtype=object)[ranks.max(0)]


def _methods(plan: Plan) -> dict[str, NDArray[np.str_]]:
    full, gn, tensor = plan.method, plan.gn_method, plan.tensor_method
    ends = np.diag(full)
    coupling = _worst(full, np.broadcast_to(ends[:, None], full.shape), np.broadcast_to(ends[None, :], full.shape))
    coupling = np.where(full == Method.ZERO, full, coupling)
    for v in np.flatnonzero(ends == Method.PROBES):
        coupling[v, v] = Method.EXACT  # C(v, v) = 1 by definition
    found = {
        "resonance": full,
        "coupling": coupling,
        "stable_rank": plan.rank_method,
        "gn_gap": np.where(tensor == Method.ZERO, tensor, _worst(tensor, gn)),
        "gn_norm": gn,
        "tensor_norm": tensor,
    }
    return {name: methods.astype(str) for name, methods in found.items()}
