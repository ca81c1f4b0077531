"""Files of stored matrices: bit for bit, whole or absent, typed errors."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import dag_hesse as dh
from dag_hesse.errors import BlockFileError, DagHesseError, MissingFileError, OptionError
from tests.storage.models import made, stored


def numbers(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What a file holds."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for rounding: where in memory a product's operands lie, as in a mapped file, decides how it is added up."""
    return found.dtype == expected.dtype and torch.allclose(
        found, expected, rtol=1e-5 if found.itemsize == 4 else 1e-12
    )


@pytest.mark.parametrize(
    "options",
    [{"rank": 4}, {"error": 0, "parts": True}, {"band": 1, "error": 0.3}, {"mode": "joint", "rank": 3}],
)
@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_round_trip(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    matrix, path = stored(name, **options), tmp_path / "deep" / "h.safetensors"
    matrix.save(path)
    written = numbers(path)
    found = dh.BlockMatrix.load(path)
    assert same(found.to_dense(), matrix.to_dense()) and found.names == matrix.names
    assert found.form == matrix.form and found.pairs == matrix.pairs and str(found) == str(matrix)
    z = torch.randn(matrix.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert same(found @ z, matrix @ z)
    assert same(found.solve(z, damping=1.0).x, matrix.solve(z, damping=1.0).x)
    for part in matrix._parts:
        assert same(found.part(part).to_dense(), matrix.part(part).to_dense())
    found.save(path)  # over the file that it is mapped from
    again = numbers(path)
    assert again[0] == written[0] and again[1].keys() == written[1].keys()
    assert all(torch.equal(x, written[1][name]) for name, x in again[1].items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_submatrix_is_saved(tmp_path: Path) -> None:
    some = stored("tanh", rank=4)[["0", "3"]]
    some.save(tmp_path / "h")
    assert same(dh.BlockMatrix.load(tmp_path / "h").to_dense(), some.to_dense())


def test_float32_and_one_point(tmp_path: Path) -> None:
    model, (x, y) = made("tanh")
    matrix = dh.BlockMatrix.from_model(__import__("copy").deepcopy(model).float(), (x.float(), y), points=["0"], rank=5)
    matrix.save(tmp_path / "h")
    found = dh.BlockMatrix.load(tmp_path / "h")
    assert found.dtype == torch.float32 and same(found.to_dense(), matrix.to_dense())


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    matrix = stored("tanh", rank=4)
    matrix.save(path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for size in (0, 4, 8, 8 + length // 2, 8 + length, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(BlockFileError, match="whole file"):
            dh.BlockMatrix.load(path)
    path.write_bytes(b"\x80\x04K\x01." * 50)  # a pickle
    with pytest.raises(BlockFileError):
        dh.BlockMatrix.load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(BlockFileError, match="format None"):
        dh.BlockMatrix.load(path)
    with pytest.raises(MissingFileError, match="no blocks"):
        dh.BlockMatrix.load(tmp_path / "nothing")
    with pytest.raises(OptionError, match="path"):
        dh.BlockMatrix.load(7)  # type: ignore[arg-type]


def test_formats(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    matrix = stored("tanh", rank=4)
    matrix.save(path)
    with safe_open(path, framework="pt") as file:
        header, tensors = dict(file.metadata()), {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {**header, "version": "2"})
    with pytest.raises(BlockFileError, match="newer"):
        dh.BlockMatrix.load(path)
    broken = json.loads(header["matrix"])
    del broken["parts"]["full"]["cores"]
    save_file(tensors, path, {**header, "matrix": json.dumps(broken)})
    with pytest.raises(BlockFileError):
        dh.BlockMatrix.load(path)
    save_file({k: x[:, :1] for k, x in tensors.items()}, path, header)
    with pytest.raises(BlockFileError, match="shape"):
        dh.BlockMatrix.load(path)
    dh.analyze(*made("tanh"), points=["0", "2"]).save(path)
    with pytest.raises(BlockFileError, match="report"):
        dh.BlockMatrix.load(path)
    matrix.save(path)
    with pytest.raises(DagHesseError):
        dh.load(path)


def test_live_blocks_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="live"):
        stored("tanh", band=0, rest="live").save(tmp_path / "h")
    assert not list(tmp_path.iterdir())


_SAVING = """
import sys, torch
import dag_hesse as dh
from dag_hesse.storage import files
matrix = dh.BlockMatrix.load(sys.argv[1])
write = files.save_file
def slow(tensors, place, text):
    write(tensors, place, text)
    print("written", flush=True)
    sys.stdin.read()
files.save_file = slow
matrix.save(sys.argv[1])
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    stored("tanh", rank=4).save(path)
    before = path.read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", _SAVING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.01)
    assert path.read_bytes() == before and dh.BlockMatrix.load(path).facts["part"] == "full"


def test_failure_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "h.safetensors"
    matrix = stored("tanh", rank=4)
    matrix.save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("dag_hesse.storage.files.save_file", full)
    with pytest.raises(OSError, match="no space"):
        matrix.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = stored("tanh", rank=4, band=1).plot(tmp_path / "b.png")
    assert len(figure.axes) == 2 and (tmp_path / "b.png").stat().st_size > 1000
    assert stored("relu", error=0, part="gn").plot() is not None
