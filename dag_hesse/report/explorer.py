"""Node data for Google's Model Explorer: a metric as colours of the nodes of a graph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.export import ExportedProgram

from dag_hesse.errors import OptionError, PointError, choose, kind_of, suggest
from dag_hesse.estimate import METRICS
from dag_hesse.files import check_output, write_text
from dag_hesse.report.colour import colours
from dag_hesse.report.pairs import TITLES
from dag_hesse.report.report import CurvatureReport


def write_model_explorer(
    report: CurvatureReport,
    path: str | Path,
    metric: str = "resonance",
    point: str | int | None = None,
    program: ExportedProgram | None = None,
) -> None:
    """As :meth:`dag_hesse.CurvatureReport.to_model_explorer`."""
    check_output(path)
    choose("metric", metric, METRICS)
    if program is not None and not isinstance(program, ExportedProgram):
        raise OptionError(f"program is {kind_of(program)}; expected what torch.export.export() returns.")
    ids = dict(enumerate(report.names)) if program is None else _nodes(report, program)
    values = report.values[metric]
    column = values.diagonal() if point is None else values[:, report.index(point)]
    shown = colours(column)
    symbol, title = TITLES[metric]
    data = {
        "name": f"{symbol} {title}" + ("" if point is None else f" with {report.names[report.index(point)]}"),
        "results": {
            ids[k]: {"value": value, "bgColor": shown[k] or "#dddddd"}
            for k, value in enumerate(column.tolist())
            if k in ids and np.isfinite(value)
        },
    }
    if program is None:
        graph = Path(path)
        write_text(graph.with_name(f"{graph.stem}.graph.json"), json.dumps(_graph(report), ensure_ascii=False))
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _graph(report: CurvatureReport) -> dict[str, Any]:
    """The graph of the points, modules as groups."""
    return {
        "label": str(report.facts["model"]),
        "graphs": [
            {
                "id": "points",
                "nodes": [
                    {
                        "id": point.name,
                        "label": point.name.rpartition(".")[2],
                        "namespace": "/".join(point.name.split(".")[:-1]),
                        "incomingEdges": [
                            {"sourceNodeId": report.names[v], "sourceNodeOutputId": "0", "targetNodeInputId": str(slot)}
                            for slot, v in enumerate(np.flatnonzero(report.distance[:k, k] == 1).tolist())
                        ],
                        "attrs": [{"key": "shape", "value": "×".join(map(str, point.shape))}],
                    }
                    for k, point in enumerate(report.points)
                ],
            }
        ],
    }


def _nodes(report: CurvatureReport, program: ExportedProgram) -> dict[int, str]:
    """Per point, the node that computes a module's last output, or brings a parameter in."""
    ids = dict(_named(program))
    found = {k: ids[name] for k, name in enumerate(report.names) if name in ids}
    if not found:
        raise PointError(f"the program has none of the report's points. {suggest(report.names[0], ids)}")
    return found


def _named(program: ExportedProgram) -> Iterator[tuple[str, str]]:
    """Names of parameters and modules with a node each, a module's last one last."""
    for node, parameter in program.graph_signature.inputs_to_parameters.items():
        yield parameter, node
    for op in program.graph.nodes:
        for module, _ in op.meta.get("nn_module_stack", {}).values():
            if op.op == "call_function" and module:
                yield module, op.name
