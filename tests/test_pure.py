"""Without the C++ extension: it is installed, says so, and gives the same numbers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dag_hesse import _core, native
from dag_hesse._structure import reachability

ROOT = Path(__file__).parent.parent
MAP = """
import sys, torch, dag_hesse as dh
from dag_hesse import native
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)).double()
report = dh.analyze(net, (torch.randn(600, 16).double(), torch.arange(600) % 4), progress=False)
print(native.core is None, "C++ extension was not built" in str(report), report.rank_bound.tolist())
print(*report.resonance.ravel().tolist())
"""


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]], list[int], list[int], list[int]]:
    count = draw(st.integers(2, 12))
    pairs = [(u, v) for v in range(count) for u in range(v)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=30))
    nodes = st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True)
    capacity = draw(st.lists(st.integers(0, 2**40), min_size=count, max_size=count))
    return count, edges, capacity, draw(nodes), draw(nodes)


@given(networks())
def test_algorithms_agree(network: tuple[int, list[tuple[int, int]], list[int], list[int], list[int]]) -> None:
    count, edges, capacity, sites, sinks = network
    table = np.array(edges, dtype=np.int64).reshape(-1, 2)
    inputs, children = table[:, 0].copy(), table[:, 1].copy()
    at, points = np.array(sites, dtype=np.int64), np.arange(len(sites), dtype=np.int64)
    found = [module.reach(count, inputs, children, at, points, len(sites)) for module in (_core, reachability)]
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(*(m.meetings(found[0], inputs, children) for m in (_core, reachability)))
    to = np.array(sinks, dtype=np.int64)
    room = np.array(capacity, dtype=np.int64)
    assert _core.min_cut(inputs, children, room, at, to) == reachability.min_cut(inputs, children, room, at, to)


def _run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_numbers_are_the_same() -> None:
    said, with_it = _run(MAP)
    also, without = _run(f"import sys; sys.modules['dag_hesse._core'] = None{MAP}")
    assert said.startswith("False False") and also.startswith("True True")
    assert said.split(" ", 2)[2] == also.split(" ", 2)[2]
    np.testing.assert_allclose(np.fromstring(with_it, sep=" "), np.fromstring(without, sep=" "), rtol=1e-12)
    assert native.core is _core


@pytest.mark.parametrize("asked", [{"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}, {"DAG_HESSE_PURE": "1"}])
def test_a_wheel_is_built_without_a_compiler(tmp_path: Path, asked: dict[str, str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "dag_hesse"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, env={**os.environ, **asked})
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dag_hesse/_analyze.py" in names and not any(name.endswith((".so", ".pyd")) for name in names)
    assert wheel.name.endswith("py3-none-any.whl") == ("DAG_HESSE_PURE" in asked)
