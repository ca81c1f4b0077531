"""The documentation: examples run from top to bottom, links lead somewhere, and the reference has every public name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

import dag_hesse as dh
from dag_hesse.sweep import compiled

ROOT = Path(__file__).parents[1]
MARKDOWN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# An overview of the interface and no program: design.md.
PAGES = [page for page in MARKDOWN if page.name != "design.md" and "```python" in page.read_text(encoding="utf-8")]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of its own, no windows, and programs that PyTorch runs in place of a compiler's minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiled, "_compiled", lambda part, inputs: part)
    matplotlib.use("agg")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_examples_run(page: Path, alone: None) -> None:
    text, names = page.read_text(encoding="utf-8"), dict[str, Any](__name__="__main__")
    with torch.random.fork_rng():
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            before = text[: block.start(1)].count("\n")  # so that errors name the page's own lines
            exec(compile("\n" * before + block[1], str(page), "exec"), names)


@pytest.mark.parametrize("page", MARKDOWN, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    directives = re.findall(r"^::: dag_hesse\.(\S+)", text, re.MULTILINE)
    assert len(directives) == len(set(directives))
    assert not {*dh.__all__, *(f"theory.{name}" for name in dh.theory.__all__)} - set(directives)


def test_every_page_is_in_the_navigation() -> None:
    pages = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(pages) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in MARKDOWN[1:])


def test_types_are_shipped() -> None:
    assert (ROOT / "dag_hesse" / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len(MARKDOWN[0].read_text(encoding="utf-8").splitlines()) <= 150
