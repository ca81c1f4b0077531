"""Node data for Google's Model Explorer, by torch.export's graph and by the graph of the points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dag_hesse as dh
from dag_hesse.errors import OptionError, PointError
from tests.page.reports import made

BATCH = torch.ones(3, 4), torch.tensor([0, 1, 1])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))


def test_nodes_are_those_of_the_exported_program(tmp_path: Path) -> None:
    model = network()
    program = torch.export.export(model, BATCH[:1])
    report = dh.analyze(model, BATCH, points=["0", "1"])
    report.to_model_explorer(tmp_path / "a.json", program=program)
    data = json.loads((tmp_path / "a.json").read_text())
    found = {node: result["value"] for node, result in data["results"].items()}
    assert found == {"linear": report.resonance[0, 0], "tanh": report.resonance[1, 1]}  # outputs of the modules
    assert {"linear", "tanh"} <= {node.name for node in program.graph.nodes}
    weights = dh.analyze(model, BATCH, points=["0.weight", "2.bias"], space="parameter")
    weights.to_model_explorer(tmp_path / "b.json", metric="gn_norm", point="2.bias", program=program)
    results = json.loads((tmp_path / "b.json").read_text())["results"]
    assert {k: v["value"] for k, v in results.items()} == dict(zip(["p_0_weight", "p_2_bias"], weights.gn_norm[:, 1].tolist(), strict=True))  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_without_a_program_the_graph_of_the_points_is_written_too(tmp_path: Path) -> None:
    report = made(9)
    report.to_model_explorer(tmp_path / "map.json", metric="stable_rank", point=0)
    data = json.loads((tmp_path / "map.json").read_text())
    (graph,) = json.loads((tmp_path / "map.graph.json").read_text())["graphs"]
    assert [node["id"] for node in graph["nodes"]] == list(report.names)
    edges = {(edge["sourceNodeId"], node["id"]) for node in graph["nodes"] for edge in node["incomingEdges"]}
    upper = zip(*np.nonzero(np.triu(report.distance == 1)), strict=True)
    assert edges == {(report.names[i], report.names[j]) for i, j in upper}
    known = ~np.isnan(report.stable_rank[:, 0])
    assert list(data["results"]) == [name for name, known_ in zip(report.names, known, strict=True) if known_]
    assert all(result["bgColor"].startswith("#") and len(result["bgColor"]) == 7 for result in data["results"].values())


def test_what_is_no_program_is_told(tmp_path: Path) -> None:
    report = made(3)
    with pytest.raises(OptionError, match=r"Sequential.*torch\.export"):
        report.to_model_explorer(tmp_path / "a.json", program=network())  # type: ignore[arg-type]
    with pytest.raises(PointError, match="none of the report's points"):
        report.to_model_explorer(tmp_path / "a.json", program=torch.export.export(network(), BATCH[:1]))
    with pytest.raises(OptionError, match="metric"):
        report.to_model_explorer(tmp_path / "a.json", metric="r")
    assert list(tmp_path.iterdir()) == []
