"""Globs over points, and the default points of wrapped models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dag_hesse as dh
from dag_hesse import errors


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))) + x)


class Staged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.conv1, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.layer1, self.layer2 = nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.relu(self.conv1(x * self.scale))))
        return self.fc(x.mean((2, 3)))


class Wrap(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class InADict(Wrap):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(x)}


def _batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 3, 8, 8), torch.arange(4) % 3


def _points(model: nn.Module, space: str = "activation", points: list[str] | str | None = None) -> list[str]:
    return [point.name for point in dh.capture(model, _batch(), space=space, points=points).points]


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (Wrap, "model."),
        (lambda model: Wrap(Wrap(model)), "model.model."),
        (lambda model: InADict(Wrap(model)), "model.model."),
        (nn.DataParallel, "module."),
        (nn.Sequential, "0."),
        (lambda model: nn.Sequential(nn.Identity(), model), "1."),
        (lambda model: nn.Sequential(model, nn.LogSoftmax(1)), "0."),
    ],
)
def test_a_container_does_not_change_the_default_points(wrap: Callable[[nn.Module], nn.Module], prefix: str) -> None:
    for space in ("activation", "parameter"):
        own = _points(Staged(), space)
        assert own == {"activation": ["relu", "layer1", "layer2"], "parameter": ["layer1", "layer2", "fc"]}[space]
        assert _points(wrap(Staged()), space) == [prefix + name for name in own]


def test_the_parameters_of_a_bare_module_are_its_points() -> None:
    batch = torch.randn(4, 3), torch.arange(4) % 2
    report = dh.analyze(nn.Linear(3, 2), batch, space="parameter")
    assert list(report.names) == ["weight", "bias"] and report["resonance"][0, 1] > 0


def test_a_head_that_is_a_container_is_looked_into() -> None:
    head = nn.Sequential(nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), head)
    batch = torch.randn(4, 4), torch.arange(4) % 3
    assert [point.name for point in dh.capture(model, batch).points] == ["1", "2.1"]


def test_a_star_stays_between_dots() -> None:
    model = Staged()
    assert _points(model, points="layer*") == ["layer1", "layer2"]
    assert _points(model, points="layer1.*") == ["layer1.0", "layer1.1"]
    assert _points(model, points="*.?.conv[12]") == [
        f"layer{stage}.{block}.conv{conv}" for stage in (1, 2) for block in (0, 1) for conv in (1, 2)
    ]
    assert _points(model, points=["layer2**.conv[!1]", "relu"]) == ["relu", "layer2.0.conv2", "layer2.1.conv2"]
    assert set(_points(model, points="**.bias")) == {n for n, _ in model.named_parameters() if n.endswith("bias")}
    with pytest.raises(errors.PointError, match=r"'\*\*conv9\*\*' does|matches no"):
        _points(model, points="*conv9*")
    with pytest.raises(errors.PointError, match=r"\* does not cross dots: '\*\*\.conv1\.weight' does"):
        _points(model, points="*.conv1.weight")


def test_globs_in_parameter_space_match_modules() -> None:
    model = Staged()
    assert _points(model, "parameter", "layer*") == ["layer1", "layer2"]
    assert _points(model, "parameter", "layer1.*") == ["layer1.0", "layer1.1"]
    assert _points(model, "parameter", "*") == ["scale", "conv1", "layer1", "layer2", "fc"]
    assert set(_points(model, "parameter", "**")) == {name for name, _ in model.named_parameters()}
    assert _points(model, "parameter", ["layer1.*.conv1", "*.bias"]) == [
        "conv1.bias",
        "layer1.0.conv1",
        "layer1.1.conv1",
        "fc.bias",
    ]
    H = dh.HessianOperator(model, _batch(), points="layer*", space="parameter")
    assert H.names == ("layer1", "layer2")
    assert H.shape[0] == sum(p.numel() for n, p in model.named_parameters() if n.startswith("layer"))


def test_stored_matrices_and_operators_take_the_same_globs() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
    batch = torch.randn(5, 3), torch.arange(5) % 2
    points = ["0", "2.0", "2.1"]
    B = dh.BlockMatrix.from_model(model, batch, points=points)
    H = dh.HessianOperator(model, batch, points=points, space="activation")
    for key, names in (
        ("*", ("0", "2.0", "2.1")),
        ("2.*", ("2.0", "2.1")),
        ("**0", ("0", "2.0")),
        (["0", -1], ("0", "2.1")),
    ):
        assert B[key].names == H[key].names == names
