"""Band, interaction radius, budget, live blocks, solves; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import dag_hesse as dh
from dag_hesse.errors import BatchCouplingError, MemoryBudgetError, OptionError, PointError, StaleError, VectorError
from dag_hesse.storage import Storage
from tests.oracle import error
from tests.storage.models import CASES, dense, made, stored


def _banded(whole: torch.Tensor, matrix: dh.BlockMatrix, band: int) -> torch.Tensor:
    found = whole.clone()
    for v, row in enumerate(found.split(matrix.form.sizes)):
        for w, block in enumerate(row.split(matrix.form.sizes, dim=1)):
            if matrix[v, w].distance > band:
                block.zero_()
    return found


@pytest.mark.parametrize("name", ["tanh", "relu"])
@pytest.mark.parametrize("band", [0, 1])
def test_band(name: str, band: int) -> None:
    matrix, whole = stored(name, band=band, error=0), dense(name, "activation")
    expected = _banded(whole, matrix, band)
    assert error(matrix.to_dense(), expected) < 1e-10
    true = float((whole - expected).norm())
    assert true <= matrix.facts["dropped"] * (1 + 1e-10) and matrix.facts["dropped"] <= true * (1 + 1e-6)
    block = matrix["0", "3"]
    assert block.kind is Storage.ZERO and block.reason == "outside the band" and not block.dense().any()
    assert not (block @ torch.ones(36).double()).any() and block.rank == 0
    assert block.error >= float(whole[:40, -36:].norm()) * (1 - 1e-10)


def test_dropped_is_bounded_by_a_sketch() -> None:
    matrix, whole = stored("gate", band=0, rank=6), dense("gate", "activation")
    true = float((whole - _banded(whole, matrix, 0)).norm())
    assert true <= matrix.facts["dropped"]


def test_distance_between_parameters_is_that_of_their_layers() -> None:
    model, batch = made("tanh")
    matrix = dh.BlockMatrix.from_model(model, batch, points=["0", "2", "4"], space="parameter", rank=4)
    assert [[matrix[v, w].distance for w in range(3)] for v in range(3)] == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    apart = dh.BlockMatrix.from_model(model, batch, points=["2.weight", "2.bias", "4.bias"], space="parameter", rank=4)
    assert apart["2.weight", "2.bias"].distance == 0 and apart["2.bias", "4.bias"].distance == 1


@pytest.mark.parametrize("eps", [0.9, 0.5, 0.05])
def test_interaction_radius(eps: float) -> None:
    matrix, whole = stored("tanh", eps=eps, error=0), stored("tanh", error=0)
    norms, sizes = whole.norms(), range(3)
    distance = np.array([[whole[v, w].distance for w in sizes] for v in sizes])
    own = np.minimum(norms.diagonal()[:, None], norms.diagonal())
    strong = (norms >= eps * own) & ~np.eye(3, dtype=bool)
    assert matrix.facts["band"] == distance[strong].max(initial=0)
    means = [norms[distance == d].mean() for d in range(3)]
    rate = np.exp(np.polyfit(range(3), np.log(means), 1)[0])
    diagonal = norms.diagonal()
    formula = next(k for k in range(100) if diagonal.max() * rate**k < eps * diagonal.min())
    said = f"interaction radius for ε = {eps:g}: {matrix.facts['band']} as measured; {formula} by the paper's formula"
    assert said in str(matrix) and f"a factor of {rate:.3g} a step" in str(matrix)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_band_by_error(share: float) -> None:
    matrix, whole = stored("tanh", band="error", error=share), dense("tanh", "activation")
    assert float((matrix.to_dense() - whole).norm()) <= 1.2 * share * float(whole.norm())


@pytest.mark.parametrize("mode", ["shared", "joint"])
def test_live_blocks_sweep(mode: str) -> None:
    matrix, expected = stored("tanh", mode=mode, band=0, error=0, rest="live"), dense("tanh", "activation", mode)
    z = torch.randn(len(expected), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert error(matrix @ z, expected @ z) < 1e-10 and error(matrix.to_dense(), expected) < 1e-10
    block = matrix["2", "0"]
    rows, columns = slice(*np.cumsum([matrix.form.sizes[0], matrix.form.sizes[1]])), slice(0, matrix.form.sizes[0])
    assert block.kind is Storage.LIVE and error(block @ z[columns], expected[rows, columns] @ z[columns]) < 1e-10
    some = matrix[["2", "3"]]
    first = matrix.form.sizes[0]
    assert error(some @ z[first:], expected[first:, first:] @ z[first:]) < 1e-10
    solution = matrix.solve(z, damping=1.0, rtol=1e-10)
    assert solution.method == "minres" and solution.residual < 1e-6 and solution.iterations > 0


def test_live_blocks_notice_changes() -> None:
    model, batch = made("tanh")
    model = copy.deepcopy(model)
    matrix = dh.BlockMatrix.from_model(model, batch, points=["0", "2"], band=0, rest="live")
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    with pytest.raises(StaleError, match="weight"):
        matrix @ torch.ones(76).double()
    assert matrix["0", "0"].dense().shape == (40, 40)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_memory(name: str, share: float) -> None:
    whole = stored(name, error=0)
    memory = int(share * 8 * sum(d * d for d in whole.cores.dims))
    matrix, expected = stored(name, memory=memory, error=1e-6), dense(name, "activation")
    assert matrix.bytes <= memory
    assert float((matrix.to_dense() - expected).norm()) <= matrix.facts["bound"] + 1e-10


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"part": "gn"}, "cholesky"),
        ({"part": "gn", "rank": 3}, "cholesky"),
        ({"error": 0}, "minres"),
        ({"rank": 4, "band": 1}, "minres"),
    ],
)
@pytest.mark.parametrize("mode", ["shared", "joint"])
def test_solve(mode: str, options: dict[str, Any], method: str) -> None:
    matrix = stored("tanh", mode=mode, **options)
    whole = matrix.to_dense()
    damping = 0.05 * float(torch.linalg.eigvalsh(whole)[-1])
    z = torch.randn(len(whole), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = matrix.solve(z, damping=damping, rtol=1e-12)
    expected = torch.linalg.solve(whole + damping * torch.eye(len(whole)).double(), z)
    assert found.method == method and error(found.x, expected) < 1e-6
    true = (z - whole @ found.x - damping * found.x).norm(dim=0) / z.norm(dim=0)
    assert found.residual == pytest.approx(float(true.max()), abs=1e-10)
    pieces = [x.reshape(s) for x, s in zip(z[:, 0].split(matrix.form.sizes), matrix.form.shapes, strict=True)]
    assert isinstance(matrix.solve(pieces, damping=damping).x, list)


def test_solve_of_dense_blocks_without_damping() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2)).double()
    matrix = dh.BlockMatrix.from_model(
        model, (torch.randn(9, 3).double(), torch.randn(9, 2).double()), space="parameter"
    )
    z = torch.ones(8).double()
    found = matrix.solve(z)
    assert found.method == "cholesky" and found.residual < 1e-10 and error(matrix @ found.x, z) < 1e-10


def test_report_blocks(tmp_path: Any) -> None:
    model, batch = made("tanh")
    report = dh.analyze(model, batch, points=["0", "2", "3"])
    matrix = report.blocks(error=0)
    assert error(matrix.to_dense(), dense("tanh", "activation")) < 1e-10
    assert error(matrix["0", "3"].dense(), report.block("0", "3")) < 1e-10
    gn = report.blocks(part="gn", rank=5)
    assert gn.facts["part"] == "gn" and error(gn.to_dense(), dense("tanh", "activation", part="gn")) < 0.5
    report.save(tmp_path / "r.safetensors")
    with pytest.raises(StaleError, match=r"report\.blocks"):
        dh.load(tmp_path / "r.safetensors").blocks()
    with pytest.raises(BatchCouplingError):
        dh.analyze(model, batch, points=["0", "2"], batch_mode="per_sample").blocks()


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    stored("tanh", rank=4, progress=lambda *news: told.append(news))
    assert {stage for stage, _, _ in told} == {"sketch", "blocks"} and all(0 < a <= b for _, a, b in told)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"band": -1}, OptionError, "band=-1"),
        ({"band": 1.5}, OptionError, "integer"),
        ({"band": "wide"}, OptionError, "band"),
        ({"band": 1, "eps": 0.1}, OptionError, "one of them"),
        ({"eps": 0}, OptionError, "eps=0"),
        ({"error": 1.5}, OptionError, "error=1.5"),
        ({"error": -0.1}, OptionError, "error=-0.1"),
        ({"rank": 0}, OptionError, "rank=0"),
        ({"memory": "lots"}, OptionError, "GiB"),
        ({"memory": 0}, OptionError, "memory"),
        ({"memory": 100}, MemoryBudgetError, "one direction"),
        ({"rest": "keep"}, OptionError, "rest"),
        ({"part": "half"}, OptionError, "part"),
        ({"seed": "a"}, OptionError, "seed"),
        ({"mode": "per_sample"}, OptionError, "batch_mode"),
        ({"rnak": 3}, TypeError, "rnak"),
    ],
)
def test_refused_options(options: dict[str, Any], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        stored("tanh", **options)


def test_refused_points_and_vectors() -> None:
    model, batch = made("tanh")
    with pytest.raises(PointError):
        dh.BlockMatrix.from_model(model, batch, points=["nowhere"])
    # Of two linear layers, the tensor part is alive between them alone.
    linear = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
    given = (torch.randn(5, 3).double(), torch.randn(5, 2).double())
    with pytest.raises(OptionError, match="leaves no block"):
        dh.BlockMatrix.from_model(linear, given, space="parameter", part="tensor", band=0)
    matrix = stored("tanh", rank=3)
    for wrong in (torch.ones(5).double(), torch.ones(112), [torch.ones(40)], "z"):
        with pytest.raises(VectorError):
            matrix @ wrong
    with pytest.raises(VectorError):
        matrix["0", "2"] @ [1.0]
    with pytest.raises(OptionError, match="damping"):
        matrix.solve(torch.ones(112).double(), damping=-1.0)
    with pytest.raises(OptionError, match="no factors"):
        stored("tanh", band=0)["0", "3"].factors()
