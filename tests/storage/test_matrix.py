"""Stored blocks against dense float64 Hessians of the oracle: exact ones, approximate ones, and what is said of errors."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import dag_hesse as dh
from dag_hesse.errors import DagHesseError, OptionError
from dag_hesse.storage import Storage
from dag_hesse.storage.orthonormal import orthonormal
from tests.oracle import error
from tests.storage.models import CASES, dense, made, points, stored

SPACES, MODES = ("activation", "parameter"), ("shared", "joint")
KINDS = [
    (name, space, mode)
    for name in CASES
    for space in SPACES
    for mode in MODES
    if (space, mode) != ("parameter", "joint")
]


@pytest.mark.parametrize(("name", "space", "mode"), KINDS)
def test_exact_blocks_and_products(name: str, space: str, mode: str) -> None:
    matrix, expected = stored(name, space, mode, error=0), dense(name, space, mode)
    found = matrix.to_dense()
    assert matrix.names == points(name, space)
    assert error(found, expected) < 1e-10 and torch.equal(found, found.T)
    assert matrix.facts["error"] < 1e-14 and float((found - expected).norm()) <= matrix.facts["bound"] < 1e-13
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(len(found), 3, dtype=torch.float64, generator=generator)
    assert error(matrix @ z, expected @ z) < 1e-10 and error(matrix @ z[:, 0], expected @ z[:, 0]) < 1e-10
    pieces = dict(zip(matrix.names, z[:, 0].split(matrix.form.sizes), strict=True))
    shaped = {k: x.reshape(s) for (k, x), s in zip(pieces.items(), matrix.form.shapes, strict=True)}
    assert error(torch.cat([x.flatten() for x in (matrix @ shaped).values()]), expected @ z[:, 0]) < 1e-10
    v, w = matrix.names[0], matrix.names[-1]
    block, right = matrix[v, w], z[-matrix.form.sizes[-1] :]
    rows, columns = slice(0, block.shape[0]), slice(-block.shape[1], None)
    assert error(block.dense(), expected[rows, columns], 1e-12) < 1e-9
    assert error(block @ right, expected[rows, columns] @ right, 1e-12) < 1e-9
    assert torch.equal(block.T.dense(), block.dense().T) and block.T.shape == block.shape[::-1]
    assert matrix.norm() == pytest.approx(float(expected.norm()), rel=1e-10)
    assert matrix.norms()[0, -1] == pytest.approx(float(expected[rows, columns].norm()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "options", [{"rank": 4}, {"error": 0.2}, {"rank": 9, "error": 0.3}, {"error": 0.05, "seed": 3}]
)
@pytest.mark.parametrize(("name", "space", "mode"), KINDS)
def test_errors_are_within_their_bounds(name: str, space: str, mode: str, options: dict[str, float]) -> None:
    matrix, expected = stored(name, space, mode, **options), dense(name, space, mode)
    off = matrix.to_dense() - expected
    said = matrix.facts["error"] * matrix.facts["size"]
    assert float(off.norm()) <= matrix.facts["bound"] + 1e-10
    assert float(off.norm()) == pytest.approx(said, rel=0.6, abs=1e-10)  # 16 probes
    rows = off.split(matrix.form.sizes)
    for v in range(len(matrix.names)):
        for w, true in enumerate(rows[v].split(matrix.form.sizes, dim=1)):
            assert float(true.norm()) <= matrix[v, w].error + 1e-10, (v, w)
    if "rank" not in options:
        assert matrix.facts["error"] <= options["error"]


@pytest.mark.parametrize("part", ["gn", "tensor"])
@pytest.mark.parametrize("name", CASES)
def test_parts(name: str, part: str) -> None:
    expected = dense(name, "activation", part=part)
    if not expected.norm() > 1e-12:
        with pytest.raises(OptionError, match="proved zero"):
            stored(name, part=part)
        return
    matrix = stored(name, part=part, error=1e-9)
    assert error(matrix.to_dense(), expected) < 1e-8
    assert matrix.facts["route"] == ("gram" if part == "gn" else "exact")


def test_parts_beside_each_other() -> None:
    curved, flat = stored("tanh", error=0, parts=True), stored("relu", error=0, parts=True)
    for matrix, name in ((curved, "tanh"), (flat, "relu")):
        assert matrix.part("full") is matrix
        for part in ("gn", "tensor"):
            found = matrix.part(part).to_dense()
            assert error(found, dense(name, "activation", part=part), 1e-3) < 1e-10
    assert flat.facts["route"] == "gram" and not flat.part("tensor").to_dense().any()
    assert flat.part("tensor")["0", "3"].reason == "proved by structure"
    assert error(curved[["0", "3"]].part("gn").to_dense(), curved.part("gn")[["0", "3"]].to_dense()) == 0.0
    with pytest.raises(OptionError, match="parts=True"):
        stored("tanh", error=0).part("gn")


def test_factors_and_singular_values() -> None:
    matrix = stored("tanh", rank=4)
    block = matrix["0", "2"]
    u, s, v = block.factors()
    assert block.kind is Storage.LOW_RANK and block.rank == 4 and u.shape == (1, 40, 4) and v.shape == (1, 36, 4)
    assert error((u[0] * s[0]) @ v[0].T, block.dense()) < 1e-12
    assert torch.allclose(torch.linalg.svdvals(block.dense())[:4], block.singular_values(), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"), [("tanh", {"error": 0}), ("tanh", {"rank": 5}), ("residual", {"part": "gn"})]
)
def test_scipy_and_eigenvalues(name: str, options: dict[str, float]) -> None:
    matrix = stored(name, **options)
    expected = np.linalg.eigvalsh(matrix.to_dense().numpy())
    values, vectors = matrix.eigsh(3, which="LA", tol=0)
    assert np.allclose(values, expected[-3:], rtol=1e-8)
    assert np.allclose(matrix.to_scipy() @ vectors, vectors * values, atol=1e-8 * abs(expected).max())
    assert float(matrix.trace()) == pytest.approx(expected.sum(), rel=1e-10)
    assert torch.allclose(matrix.diagonal(), matrix.to_dense().diagonal(), atol=1e-14)
    assert error((2 * matrix) @ torch.ones(matrix.shape[0]).double(), 2 * matrix.to_dense().sum(1)) < 1e-12


def test_some_points() -> None:
    whole, expected = stored("tanh", rank=6), stored("tanh", rank=6).to_dense()
    some = whole[["0", "3"]]
    places = torch.cat([torch.arange(40), torch.arange(76, 112)])
    assert some.names == ("0", "3") and error(some.to_dense(), expected[places][:, places]) < 1e-14
    assert whole[["[02]"]].names == ("0", "2") and whole[[-1]].names == ("3",)
    assert whole["3"].names == ("3",)
    for wrong in (["nothing*"], [], [9], {"0"}):
        with pytest.raises(DagHesseError):
            whole[wrong]
    with pytest.raises(DagHesseError, match=r"Near names|Known names"):
        whole["0", "9"]
    with pytest.raises(DagHesseError, match="two points"):
        whole["0", "2", "3"]


def test_random_state_and_text_are_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    matrix = stored("tanh", rank=4, band=1)
    assert torch.equal(before, torch.get_rng_state())
    text = str(matrix)
    assert "outside the band" in text and "low-rank" in text and "n·k·d·r" in text
    assert str(matrix) == text and isinstance(matrix, dh.BlockMatrix)
    with pytest.raises(OptionError, match="save"):
        pickle.dumps(matrix)


def test_same_seed_same_numbers() -> None:
    assert torch.equal(stored("gate", rank=4).to_dense(), stored("gate", rank=4).to_dense())
    assert not torch.equal(stored("gate", rank=4).to_dense(), stored("gate", rank=4, seed=1).to_dense())


def _concave(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (output.sin() * (y.unsqueeze(1) + 1)).mean()


@pytest.mark.parametrize("options", [{"part": "gn"}, {"part": "gn", "rank": 6}, {"rank": 6}])
def test_losses_that_are_not_convex(options: dict[str, int]) -> None:
    model, batch = made("tanh")
    operator = dh.GGNOperator if "part" in options else dh.HessianOperator
    expected = operator(model, batch, loss=_concave, points=["0", "2"], space="activation").dense()
    matrix = dh.BlockMatrix.from_model(model, batch, loss=_concave, points=["0", "2"], **options)
    off = float((matrix.to_dense() - expected).norm())
    assert torch.linalg.eigvalsh(expected)[0] < 0 and off <= matrix.facts["bound"] + 1e-10
    assert off <= 1.02 * matrix.facts["error"] * matrix.facts["size"] * 1.5 + 1e-10


@pytest.mark.parametrize("options", [{"part": "gn"}, {"error": 0}, {"rank": 6}])
def test_several_batches_are_one_loss(options: dict[str, int]) -> None:
    model, (x, y) = made("tanh")
    batches = [(x, y), (x[:2] + 1, y[:2])]
    operator = dh.GGNOperator if "part" in options else dh.HessianOperator
    expected = operator(model, batches, points=["0", "2"], space="activation").dense()
    matrix = dh.BlockMatrix.from_model(model, batches, points=["0", "2"], **options)
    assert float((matrix.to_dense() - expected).norm()) <= matrix.facts["bound"] + 1e-10


def test_samples_that_interact() -> None:
    model = copy.deepcopy(made("cnn")[0]).train()
    operator = dh.HessianOperator(model, made("cnn")[1], points=["1", "3"], space="activation", batch_mode="joint")
    matrix = dh.BlockMatrix.from_model(model, made("cnn")[1], points=["1", "3"], batch_mode="joint", rank=9)
    assert matrix.groups == 1 and matrix.shape == operator.shape
    assert float((matrix.to_dense() - operator.dense()).norm()) <= matrix.facts["bound"] + 1e-10


def test_half_precision_is_stored_in_single() -> None:
    model, (x, y) = copy.deepcopy(made("tanh")[0]).bfloat16(), made("tanh")[1]
    matrix = dh.BlockMatrix.from_model(model, (x.bfloat16(), y), points=["0", "2"], rank=6)
    assert matrix.dtype == torch.float32 and torch.equal(matrix.to_dense(), matrix.to_dense().T)
    whole = stored("tanh", error=0)[["0", "2"]].to_dense()
    assert float((matrix.to_dense() - whole).norm()) <= matrix.facts["bound"] + 0.05 * float(whole.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0, 12.0])
def test_orthonormal_columns(dtype: torch.dtype, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(2, 700, 9, generator=generator, dtype=torch.float64)
    x = (
        columns
        @ torch.diag(10.0 ** -(decay * torch.arange(9) / 4)).double()
        @ torch.randn(9, 9, generator=generator).double()
    ).to(dtype)
    q, r = orthonormal(x)
    eps = torch.finfo(dtype).eps
    assert float((q.mT @ q - torch.eye(9, dtype=dtype)).norm()) < 200 * eps
    assert error(q @ r, x.double()) < 200 * eps and not r.tril(-1).any()
