"""Reports as files: safetensors for arrays with JSON beside them, no pickle; written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from dag_hesse.errors import MissingFileError, ReportFileError
from dag_hesse.estimate import METRICS
from dag_hesse.files import check_path, write_text, write_whole
from dag_hesse.ir import Point
from dag_hesse.report.report import CurvatureReport

FORMAT = "dag-hesse report 1"


def _plain(array: np.ndarray) -> Any:
    if array.dtype.kind != "f":
        return array.tolist()
    return [[None if np.isnan(x) else float(x) for x in row] for row in array]


def to_dict(report: CurvatureReport) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "format": FORMAT,
        "points": [{"name": p.name, "shape": list(p.shape), "dim": p.dim, "kind": p.kind} for p in report.points],
        "metrics": {
            name: {
                "value": _plain(report.values[name]),
                "stderr": _plain(report.stderr[name]),
                "method": report.method[name].tolist(),
            }
            for name in METRICS
        },
        "distance": report.distance.tolist(),
        "rank_bound": report.rank_bound.tolist(),
        "phi": None if np.isnan(report.phi) else report.phi,
        "facts": dict(report.facts),
    }


def write_json(report: CurvatureReport, path: str | Path) -> None:
    """Write :func:`to_dict` as JSON."""
    text = json.dumps(to_dict(report), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def save(report: CurvatureReport, path: str | Path) -> None:
    """Write arrays as safetensors, everything else as JSON in its header."""
    arrays: dict[str, np.ndarray] = {"distance": report.distance, "rank_bound": report.rank_bound}
    for name in METRICS:
        arrays[f"value.{name}"], arrays[f"stderr.{name}"] = report.values[name], report.stderr[name]
    header = {
        "format": FORMAT,
        "points": json.dumps([asdict(point) for point in report.points]),
        "method": json.dumps({name: report.method[name].tolist() for name in METRICS}),
        "facts": json.dumps(dict(report.facts)),
    }
    solid = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_whole(path, lambda place: save_file(solid, place, header))


def load(path: str | Path) -> CurvatureReport:
    """Read a report written by :meth:`CurvatureReport.save`.

    Raises:
        MissingFileError: no such file.
        ReportFileError: the file is not a report of this package.
    """
    check_path(path)
    if not Path(path).exists():
        raise MissingFileError(f"there is no report at '{path}': expected a file written by report.save().")
    try:
        with safe_open(path, framework="numpy") as file:
            header, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ReportFileError(
            f"'{path}' is not a report: expected a file written by report.save() ({error})."
        ) from error
    if header.get("format") != FORMAT:
        raise ReportFileError(f"'{path}' has format {header.get('format')!r}; expected {FORMAT!r}.")
    points = tuple(
        Point(p["name"], tuple(p["shape"]), p["dim"], p["kind"], tuple(p["sites"]))
        for p in json.loads(header["points"])
    )
    return CurvatureReport(
        points,
        {name: arrays[f"value.{name}"] for name in METRICS},
        {name: arrays[f"stderr.{name}"] for name in METRICS},
        {name: np.array(rows) for name, rows in json.loads(header["method"]).items()},
        arrays["distance"],
        arrays["rank_bound"],
        json.loads(header["facts"]),
    )
