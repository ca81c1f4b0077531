"""The command line in a process of its own: what it writes, whoever reads what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dag_hesse as dh

BLOCKS = ("blocks", "mlp", "--batch", "6", "--image", "4")


def run(*arguments: str, tail: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = " ".join([sys.executable, "-m", "dag_hesse", *arguments, tail])
    encoding = environment.setdefault("PYTHONIOENCODING", "utf-8")
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        encoding=encoding,
        env={**os.environ, **environment},
    )


def test_blocks_are_stored(tmp_path: Path) -> None:
    done = run(*BLOCKS, "--error", "0.05", "--band", "1", "--out", str(tmp_path / "b.safetensors"))
    assert done.returncode == 0, done.stderr
    stored = dh.BlockMatrix.load(tmp_path / "b.safetensors")
    assert stored.names == ("1", "3", "5")
    assert str(stored) in done.stdout
    assert stored["1", "5"].kind.value == "zero"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--part", "tensor"), "zero"),  # a ReLU network has none
        (("--error", "2"), "below 1"),
        (("--size", "much"), "4GiB"),
        (("--band", "1", "--eps", "0.1"), "pass one"),
        (("--points", "nope"), "nope"),
    ],
)
def test_what_cannot_be_stored_is_told(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run(*BLOCKS, *arguments, "--out", str(tmp_path / "b.safetensors"))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_takes_no_file_with_it(tmp_path: Path) -> None:
    done = run("analyze", "mlp", "--batch", "6", "--image", "4", "--json", str(tmp_path / "a.json"), tail="| head -c 1")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.json").exists()


def test_a_terminal_of_few_letters() -> None:
    done = run(*BLOCKS, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert "directions" in done.stdout


def test_the_monitor_s_demo_draws_its_curves(tmp_path: Path) -> None:
    place = tmp_path / "figures" / "monitor.png"
    done = run("monitor-demo", "--seconds", "1", "--every", "5", "--out", str(place))
    assert done.returncode == 0, done.stderr
    assert place.read_bytes().startswith(b"\x89PNG")
    for text in ("step 0: loss", "sharpness", "held-out digits are read right", str(place)):
        assert text in done.stdout
