"""Reports that take no model: random numbers, with some of every kind of cell."""

from __future__ import annotations

from typing import Any

import numpy as np

import dag_hesse as dh
from dag_hesse.estimate import METRICS
from dag_hesse.ir import Point

LAYERS = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
EVIL = "<script>document.title='taken'</script>&amp;\"'"
FACTS: dict[str, Any] = {
    "model": "Encoder",
    "space": "parameter",
    "loss": 1.25,
    "batch_size": 2,
    "batch_mode": "shared",
    "dtype": "float32",
    "sweeps": 3,
    "seconds": {"capture": 0.5, "estimate": 1.5, "total": 2.0},
    "opaque": [],
    "lost": [],
    "curved ops": {"gelu": 2},
    "call": "dag_hesse.analyze(model, batch, space='parameter')",
}


def long_names(count: int) -> list[str]:
    return [f"encoder.layers.{k // 4}.{LAYERS[k % 4]}" for k in range(count)]


def made(count: int, seed: int = 0, symmetric: bool = True, names: list[str] | None = None) -> dh.CurvatureReport:
    """A chain of points with skips past every third, values of many decades, errors, zeros and NaN."""
    random, place = np.random.default_rng(seed), np.arange(count)
    hops = np.abs(place[:, None] - place[None, :])
    distance = np.where(hops == 0, 0, np.maximum(1, -(-hops // 3)))

    settled = _mirrored if symmetric else np.asarray
    values, stderr, method = {}, {}, {}
    nothing = settled(random.random((count, count)) < 0.08) & (hops > 0)
    for name in METRICS:
        value = settled(np.exp(-0.5 * distance) * random.lognormal(0.0, 2.0, (count, count)))
        how = settled(random.choice(["exact", "gram", "probes"], (count, count)))
        error = np.where(how == "probes", value * settled(random.uniform(0.0, 0.2, (count, count))), 0.0)
        how = np.where(nothing, "zero", how)
        values[name], stderr[name], method[name] = np.where(nothing, 0.0, value), np.where(nothing, 0.0, error), how
    values["stable_rank"][nothing] = np.nan
    points = tuple(Point(n, (2, 3), 6, "parameter", (k,)) for k, n in enumerate(names or long_names(count)))
    return dh.CurvatureReport(points, values, stderr, method, distance, distance + 1, FACTS)


def _mirrored(array: np.ndarray) -> np.ndarray:
    upper = np.triu(np.ones(array.shape, dtype=bool))
    return np.where(upper, array, array.T)
