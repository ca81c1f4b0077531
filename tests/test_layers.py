"""Nothing imports a later stage (design §3): the order of the house, and every module held against it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import dag_hesse

ROOT = Path(dag_hesse.__file__).parent
ORDER = (
    "errors", "options", "files", "names", "randomness", "measure", "progress", "figures", "budget", "alike", "ranks", "gathered", "_core", "native", "kernels", "ir", "rules",
    "_capture", "_structure", "plan", "sweep", "estimate", "operators", "storage", "report", "theory", "_mapper", "_analyze", "_profile",
    "experiments", "monitor", "_cli", "cli", "__main__",
)  # fmt: skip
# Methods of what an earlier stage returns that lead on to a later one; they are imported as they are called.
LEADING_ON = {("report", "theory")}


def imports() -> Iterator[tuple[str, str, bool]]:
    """(stage, stage that it imports, whether as it is loaded) of all modules."""
    for file in ROOT.rglob("*.py"):
        stage, tree = file.relative_to(ROOT).with_suffix("").parts[0], ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dag_hesse"):
                _, *rest = str(node.module).split(".")
                for name in rest[:1] or [alias.name for alias in node.names]:
                    yield stage, name, node in tree.body


def test_every_stage_has_its_place() -> None:
    assert {stage for stage, _, _ in imports()} - {"__init__"} <= set(ORDER)


def test_nothing_imports_a_later_stage() -> None:
    found = {
        (stage, other)
        for stage, other, _ in imports()
        if stage != "__init__" and other != "__version__" and ORDER.index(other) > ORDER.index(stage)
    }
    assert found == LEADING_ON
    assert not any(loaded for stage, other, loaded in imports() if (stage, other) in LEADING_ON)
