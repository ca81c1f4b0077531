"""Reports in HTML: one page that needs no network, and facts with tables for notebooks."""

from __future__ import annotations

import re
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from dag_hesse.errors import OptionError, kind_of
from dag_hesse.files import check_output, write_text
from dag_hesse.report.page_data import as_json, page_data
from dag_hesse.report.report import CurvatureReport
from dag_hesse.report.text import cells, facts

if TYPE_CHECKING:
    from dag_hesse.theory import BlockSpectra


def _table(report: CurvatureReport, metric: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in report.names)
    rows = []
    for name, row in zip(report.names, cells(report, metric), strict=True):
        shown = "".join(f'<td class="{method}" title="{method}">{escape(text)}</td>' for text, method in row)
        rows.append(f"<tr><th>{escape(name)}</th>{shown}</tr>")
    return f'<h2>{metric}</h2><div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def fragment(report: CurvatureReport) -> str:
    """Facts and tables, to stand in another page."""
    tables = "".join(_table(report, metric) for metric in ("resonance", "coupling", "gn_gap"))
    return f'<div class="dag-hesse">{_lines(report, "div")}{tables}</div>'


def _lines(report: CurvatureReport, element: str) -> str:
    return "".join(f"<{element}>{escape(line)}</{element}>" for line in facts(report))


@cache
def _template() -> tuple[str, str, str]:
    """The page's HTML, its style and its script."""
    folder = files("dag_hesse.report") / "page"
    scripts = sorted((file for file in folder.iterdir() if file.name.endswith(".js")), key=lambda file: file.name)
    names = (folder / "page.html", folder / "page.css", *scripts)
    page, style, *script = (file.read_text(encoding="utf-8") for file in names)
    return page, style, "\n".join(script)


def write_html(
    report: CurvatureReport,
    path: str | Path,
    against: CurvatureReport | None = None,
    spectra: BlockSpectra | None = None,
) -> None:
    """As :meth:`dag_hesse.CurvatureReport.to_html`."""
    from dag_hesse.theory import BlockSpectra  # theory reads reports

    check_output(path)
    if spectra is not None and not isinstance(spectra, BlockSpectra):
        raise OptionError(
            f"spectra is {kind_of(spectra)}; expected what dag_hesse.theory.block_spectra() returns, or None."
        )
    page, style, script = _template()
    parts = {
        "title": escape(f"Curvature of {report.facts['model']}"),
        "lines": _lines(report, "p"),
        "style": style,
        "script": script,
        "data": as_json(page_data(report, against, spectra)),
    }
    write_text(path, re.sub(r"<!--(\w+)-->", lambda place: parts[place[1]], page))
