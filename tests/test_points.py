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


class Tapped(nn.Module):
    """A product that no module has, tapped; called twice."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last, self.times = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), times

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        for _ in range(self.times):
            h = dh.tap(h * h.sigmoid(), "gate")
        return self.last(h)


def test_taps_join_the_default_points() -> None:
    batch = torch.randn(6, 4), torch.arange(6) % 3
    assert dh.analyze(Tapped(), batch).names == ("act", "gate")
    assert dh.analyze(Tapped(2), batch).names == ("act", "gate[0]", "gate[1]")
    assert dh.analyze(Tapped(30), batch).names[0] == "act" and len(dh.analyze(Tapped(30), batch).names) <= 18
    assert dh.analyze(Tapped(), batch, space="parameter").names == ("first", "last")

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return dh.tap(x @ self.weight, "z").tanh()

    assert dh.analyze(Bare(), batch).names == ("z",)


def test_what_is_tapped_of_the_output_is_no_point_of_its_own() -> None:
    class AtTheEnd(Tapped):
        def forward(self, x: Tensor) -> Tensor:
            return dh.tap(super().forward(x), "logits")

    assert dh.analyze(AtTheEnd(), (torch.randn(6, 4), torch.arange(6) % 3)).names == ("act", "gate")


def test_a_map_of_one_point_says_why() -> None:
    batch = torch.randn(6, 4), torch.arange(6) % 3
    report = dh.analyze(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), batch)
    assert "one point: only '1' was found in the module tree: name points=" in str(report)
    assert "one point" in report._repr_html_()
    assert "one point" not in str(
        dh.analyze(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), batch, points="1")
    )
    assert report.facts["training"] is True


def test_groups_of_modules_are_one_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3)).double()
    batch = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    H = dh.HessianOperator(model, batch)
    groups = {"weights": "*.weight", "ends": ["0.bias", "4.bias"], "middle": "2"}
    found = dh.HessianOperator(model, batch, points=groups)
    members = {
        "weights": ["0.weight", "2.weight", "4.weight"],
        "ends": ["0.bias", "4.bias"],
        "middle": ["2.weight", "2.bias"],
    }
    report = dh.analyze(model, batch, points=groups, mode="exact")
    assert set(found.names) == set(report.names) == set(groups)
    for v in groups:
        for w in groups:
            expected = H[members[v], members[w]].dense()
            assert torch.allclose(found[v, w].dense(), expected, atol=1e-12)
            assert float(report[v, w].resonance) == pytest.approx(float(expected.norm()), rel=1e-10)
    other = found.with_batch((batch[0] * 2, batch[1]))
    assert torch.allclose(
        other["ends", "middle"].dense(),
        H.with_batch((batch[0] * 2, batch[1]))[members["ends"], members["middle"]].dense(),
        atol=1e-12,
    )
    for wrong, kind in (
        ({"a": "nowhere"}, errors.PointError),
        ({"": "0"}, errors.OptionError),
        ({1: "0"}, errors.OptionError),
        ({"a": []}, errors.PointError),
        ({}, errors.PointError),
    ):
        with pytest.raises(kind):
            dh.HessianOperator(model, batch, points=wrong)  # type: ignore[arg-type]


def test_numbers_are_positions_and_never_names() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batch = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(errors.OptionError, match="'0' is the module of that name"):
        dh.analyze(model, batch, points=[0])  # type: ignore[list-item]
    report = dh.analyze(model, batch, points=["1", "0"])
    assert report.names == ("0", "1") and report["1", "1"].v == "1" and report[1, 1].v == "1" and report[0, 0].v == "0"
    H = dh.HessianOperator(model, batch)
    assert H[0].names == ("0.weight",) and H["0"].names == ("0.weight", "0.bias")
