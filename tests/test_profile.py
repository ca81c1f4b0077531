"""profile(), the plan by edges, and their command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse.cli import main
from dag_hesse.errors import OptionError
from dag_hesse.plan import edges, fuse
from dag_hesse.plan.cost import product_flops
from tests.models.zoo import CASES, case


@pytest.mark.parametrize("name", sorted(CASES))
def test_edges_are_inputs_of_nodes(name: str) -> None:
    one = case(name)
    graph = fuse(dh.capture(one.model, one.batch, loss=one.loss, output=one.out or None, points=list(one.names)))
    found = edges(graph)
    assert found
    assert {(e.source, e.target) for e in found} <= {(k, n.index) for n in graph.nodes for k in n.inputs}


def test_flops_of_a_convolution_leave_out_dead_taps() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3, 2))
    graph = dh.capture(net, (torch.randn(5, 2, 1, 1), torch.tensor([0, 1, 0, 1, 0])), points=["0"])
    node = next(n for n in graph.nodes if n.op == "aten.convolution.default")
    assert product_flops(graph, node) == 2 * 5 * 3 * 2  # only the middle kernel tap of nine meets the input


def test_profile_measures_every_swept_node() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 2))
    found = dh.profile(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["1", "3"], whole=True)
    assert all(node.seconds > 0 for node in found.nodes if node.module)
    assert found.predicted["map"].seconds > found.phases["linearize"].seconds and found.rate > 0
    assert found.predicted["map"].peak_bytes > found.predicted["sweep"].peak_bytes > 0
    assert "the ten costliest edges" in str(found)


class OwnLoss(nn.Module):
    """Returns its own loss, from which the part that Gauss-Newton keeps cannot be told."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head(self.body(x).tanh()).pow(4).mean()}


def test_profile_takes_the_options_of_analyze() -> None:
    model, batch = OwnLoss(), {"x": torch.randn(5, 3)}
    found = dh.profile(model, batch, points=["body"], output="head", whole=True)
    assert found.plan.structure.graph.split and "map" in found.phases
    found = dh.profile(model, batch, points=["body"], output="head", mode="probes", probes=4, memory=1, whole=True)
    assert found.plan.chunk == 1 and not found.plan.gram_columns
    assert [source.probes for source in found.plan.sources] == [4]
    with pytest.raises(OptionError, match="mode="):
        dh.profile(model, batch, output="head", mode="exakt")
    for wrong in ({"batch_mode": "all"}, {"verify": "hardly"}, {"compile": 1}, {"reduction": "product"}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            dh.profile(model, batch, output="head", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("space", ["activation", "parameter"])
@pytest.mark.parametrize("batch_mode", ["shared", "per_sample", "joint"])
def test_profile_in_every_batch_mode(batch_mode: str, space: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    found = dh.profile(net, batch, points=["0", "2"], space=space, batch_mode=batch_mode, verify="none", whole=True)
    assert (
        "proof" not in found.phases and found.rate > 0 and all(node.seconds > 0 for node in found.nodes if node.module)
    )
    assert found.predicted["map"].seconds > 0 and "map" in str(found)


def test_profile_of_a_compiled_sweep() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    found = dh.profile(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])), points=["0"], probes=2, compile=True)
    assert found.phases["compile"].seconds > found.phases["sweep"].seconds > 0
    assert not found.nodes and found.rate > 0 and "compile" in str(found)


def test_the_whole_map_of_a_profile_is_of_the_batch_that_is_profiled() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batches = ((torch.randn(5, 3), torch.arange(5) % 2) for _ in range(1))
    assert "map" in dh.profile(model, batches, whole=True).phases


def test_profile_command_writes_json_and_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "profile.json", tmp_path / "trace.json"]
    options = ["--mode", "probes", "--probes", "2", "--memory", "512MiB"]
    assert main(["profile", "mlp", *options, "--edges", "--json", str(files[0]), "--trace", str(files[1])]) == 0
    shown = capsys.readouterr().out
    assert "every edge" in shown and "whole map" in shown
    data = json.loads(files[0].read_text())
    assert {"op", "shape", "products", "flops", "bytes"} <= set(data["edges"][0])
    names = {event.get("name", "") for event in json.loads(files[1].read_text())["traceEvents"]}
    assert any(name.startswith("adjoint %") for name in names)
    assert main(["profile", "no-such-model"]) == 1
