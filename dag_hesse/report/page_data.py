"""What a page shows, as plain data: arrays bit for bit in base64, everything else as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dag_hesse.errors import OptionError
from dag_hesse.estimate import METRICS
from dag_hesse.names import shortened
from dag_hesse.report.colour import STOPS
from dag_hesse.report.pairs import TITLES
from dag_hesse.report.proved import WHY, proved
from dag_hesse.report.report import CurvatureReport
from dag_hesse.report.text import facts

if TYPE_CHECKING:
    from dag_hesse.theory import BlockSpectra, DecayFit

_FITTED = ("resonance", "coupling", "stable_rank")
_NAME = 28  # letters of a name beside a map
_BINS = 24  # of a spectrum, to either side of zero
_DECADES = 6.0  # that they span
Pack = Callable[[NDArray[Any]], Any]


def as_json(data: Any) -> str:
    """JSON that may stand in a script element: no ``<``, hence no end tag and no comment, is left in it.

    >>> as_json({"name": "</script>"})
    '{"name":"\\\\u003c/script>"}'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def page_data(report: CurvatureReport, against: CurvatureReport | None, spectra: BlockSpectra | None) -> dict[str, Any]:
    """Everything that the page's script reads."""
    arrays = [*report.values.values(), *report.stderr.values(), *report.method.values(), report.rank_bound]
    whole = not all(_symmetric(array) for array in arrays)
    pack = _packer(len(report), whole)
    return {
        "points": [
            {"name": p.name, "short": short, "shape": list(p.shape), "dim": p.dim, "kind": p.kind}
            for p, short in zip(report.points, shortened(report.names, _NAME), strict=True)
        ],
        "whole": whole,
        "colours": STOPS,
        "metrics": [_metric(report, name, pack) for name in METRICS],
        "distance": pack(report.distance).tolist(),
        "rank": pack(report.rank_bound).tolist(),
        "lines": facts(report),
        "proved": proved(report),
        "why": WHY,
        "facts": {key: _shown(value) for key, value in report.facts.items() if key not in ("seconds", "call")},
        "seconds": dict(report.facts["seconds"]),
        "call": report.facts.get("call", ""),
        "fits": _fits(report),
        "against": None if against is None else _comparison(report, against),
        "spectra": None if spectra is None else _spectra(spectra),
    }


def _symmetric(array: NDArray[Any]) -> bool:
    return np.array_equal(array, array.T, equal_nan=array.dtype.kind == "f")


def _packer(count: int, whole: bool) -> Pack:
    """What makes one row of a matrix: its upper triangle, or the whole of one that is not symmetric."""
    upper = np.triu_indices(count)
    return np.ravel if whole else lambda array: array[upper]


def _base64(array: NDArray[Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype=kind).tobytes()).decode()


def _metric(report: CurvatureReport, name: str, pack: Pack) -> dict[str, Any]:
    """Values in float64, standard errors (their first seven digits) in float32, methods by their first letters."""
    stderr = pack(report.stderr[name])
    return {
        "name": name,
        **dict(zip(("symbol", "title"), TITLES[name], strict=True)),
        "value": _base64(pack(report.values[name]), "<f8"),
        "stderr": _base64(stderr, "<f4") if stderr.any() else None,
        "method": "".join(str(method)[0] for method in pack(report.method[name])),
    }


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items()) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _fits(report: CurvatureReport) -> dict[str, Any]:
    """Decay with distance, of the metrics that are positive at two distances at least."""
    from dag_hesse.theory import decay_fit  # theory reads reports

    found = {}
    for metric in _FITTED:
        try:
            fit = decay_fit(report, metric)
        except OptionError:  # says that there is no line
            continue
        if np.isfinite([fit.slope, *fit.interval]).all():
            found[metric] = _fit(fit)
    return found


def _fit(fit: DecayFit) -> dict[str, Any]:
    rows = {name: getattr(fit, name).tolist() for name in ("distance", "mean", "pairs")}
    r_squared = None if np.isnan(fit.r_squared) else fit.r_squared
    return {**rows, "slope": fit.slope, "intercept": fit.intercept, "interval": fit.interval, "r_squared": r_squared}


def _comparison(report: CurvatureReport, against: CurvatureReport) -> dict[str, Any]:
    """The other report's values and the differences in standard errors, over the points that both have."""
    found = report.compare(against)
    pack = _packer(len(found.names), not all(map(_symmetric, (*found.after.values(), *found.score.values()))))
    return {
        "places": [report.index(name) for name in found.names],
        "missing": list(found.missing),
        "lines": facts(against),
        "after": [_base64(pack(found.after[name]), "<f8") for name in METRICS],
        "score": [_base64(pack(found.score[name]), "<f4") for name in METRICS],
    }


def _spectra(spectra: BlockSpectra) -> dict[str, Any]:
    """Shares of eigenvalues by decades of |λ| on one axis for all blocks: below zero, about it, above."""
    top = float(spectra.scale.max(initial=0.0)) or 1.0
    edges = top * np.logspace(-_DECADES, 0, _BINS + 1)
    edges[-1] = np.inf
    rows = zip(spectra.names, spectra.values, spectra.weights, spectra.exact.tolist(), strict=True)
    return {
        "top": top,
        "decades": _DECADES,
        "blocks": [
            {
                "name": name,
                "low": float(values[0]) if len(values) else 0.0,
                "high": float(values[-1]) if len(values) else 0.0,
                "negative": float(weights[values < 0].sum()),
                "exact": exact,
                "shares": _shares(values, weights, edges),
            }
            for name, values, weights, exact in rows
        ],
    }


def _shares(values: NDArray[Any], weights: NDArray[Any], edges: NDArray[Any]) -> list[float]:
    below = np.histogram(-values, edges, weights=weights)[0][::-1]
    above = np.histogram(values, edges, weights=weights)[0]
    about = weights[np.abs(values) < edges[0]].sum()
    return _rounded([*below, about, *above])


def _rounded(numbers: Iterable[float]) -> list[float]:
    return [round(float(x), 5) for x in numbers]
