"""Pictures of reports: what is drawn is the report's, names are legible, files are whole and the same each time."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dag_hesse.errors import DependencyError, OptionError
from tests.page.reports import made


def test_maps_and_distances_are_the_reports() -> None:
    report, metrics = made(3), ("resonance", "coupling", "gn_gap")
    figure = report.plot(metrics)
    maps, beside = figure.axes[:3], figure.axes[3:6]
    for axes, metric in zip(maps, metrics, strict=True):
        shown = axes.collections[0].get_array().filled(np.nan).reshape(3, 3)
        assert np.array_equal(shown, np.where(report.values[metric] > 0, report.values[metric], np.nan), equal_nan=True)
    for axes in beside:  # a point a pair, and the mean of every distance
        pairs, means = (line.get_xdata() for line in axes.get_lines()[:2])
        assert sorted(pairs) == sorted(report.distance[np.triu_indices(3)])
        assert list(means) == sorted(set(report.distance.ravel()))
    assert len(report.plot().axes) == 4 * 3  # with a bar of colours each
    with pytest.raises(OptionError, match="'resonance'"):
        report.plot(["resonanse"])


def test_coupling_is_logarithmic_where_it_spans_decades() -> None:
    from matplotlib.colors import LogNorm

    wide, narrow = made(6), made(6)
    narrow.values["coupling"][:] = np.linspace(0.2, 1.0, 36).reshape(6, 6)
    norms = [report.plot(["coupling"]).axes[0].collections[0].norm for report in (wide, narrow)]
    assert [isinstance(norm, LogNorm) for norm in norms] == [True, False]


@pytest.mark.parametrize("count", [5, 16, 64])
def test_names_neither_pile_up_nor_shrink_cells(count: int) -> None:
    figure = made(count).plot(["resonance", "coupling"])
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        cell = axes.get_window_extent().height / count / figure.dpi * 72  # points
        assert cell >= 7.5
        for labels, side in ((axes.get_yticklabels(), "height"), (axes.get_xticklabels(), "width")):
            boxes = [label.get_window_extent() for label in labels]
            ends = sorted(
                (getattr(box, f"{side[0]}0".replace("h", "y").replace("w", "x")), getattr(box, side)) for box in boxes
            )
            assert all(a + size <= b + 0.5 for (a, size), (b, _) in itertools.pairwise(ends))
            assert len({label.get_text() for label in labels}) == count
            assert min(box.x0 for box in boxes) >= 0 and min(box.y0 for box in boxes) >= 0
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    crossing = [(a, b) for k, a in enumerate(boxes) for b in boxes[:k] if a.overlaps(b)]
    assert crossing == []  # nothing is drawn over anything


@pytest.mark.parametrize("ending", ["pdf", "svg", "png"])
def test_one_call_writes_a_figure_always_the_same(ending: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        made(5).plot(["resonance"], tmp_path / f"{name}.{ending}")
    first, second = (tmp_path / f"{name}.{ending}" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    if ending != "png":  # vectors alone
        assert b"/Subtype /Image" not in first.read_bytes()
        assert b"<image" not in first.read_bytes()


def test_what_cannot_be_drawn_is_told_before_anything_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report: Any = made(3)
    with pytest.raises(OptionError, match=r"'.docx'.*\.pdf"):
        report.plot(path=tmp_path / "a.docx")
    with pytest.raises(OptionError, match="int"):
        report.plot(path=3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match=r"dag-hesse\[plot\]"):
        report.plot(path=tmp_path / "a.pdf")
    assert list(tmp_path.iterdir()) == []
