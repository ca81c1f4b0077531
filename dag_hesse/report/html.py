"""One self-contained HTML page: facts, maps (if matplotlib is there), tables."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

from dag_hesse.errors import DependencyError
from dag_hesse.estimate import METRICS
from dag_hesse.report.files import write_text
from dag_hesse.report.report import CurvatureReport
from dag_hesse.report.text import cells, facts

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1c1c1c}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin-top:2rem}table{border-collapse:collapse;font-size:.85rem}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e3e3e3}th:first-child{text-align:left}
td.probes{color:#8a4b00}td.zero{color:#999}svg{max-width:100%;height:auto}.wide{overflow-x:auto}
"""


def _svg(report: CurvatureReport) -> str:
    try:
        figure = report.plot()
    except DependencyError:
        return ""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _table(report: CurvatureReport, metric: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in report.names)
    rows = []
    for name, row in zip(report.names, cells(report, metric), strict=True):
        shown = "".join(f'<td class="{method}" title="{method}">{escape(text)}</td>' for text, method in row)
        rows.append(f"<tr><th>{escape(name)}</th>{shown}</tr>")
    return f'<h2>{metric}</h2><div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def fragment(report: CurvatureReport) -> str:
    """Facts and tables, to stand in another page."""
    lines = "".join(f"<div>{escape(line)}</div>" for line in facts(report))
    tables = "".join(_table(report, metric) for metric in ("resonance", "coupling", "gn_gap"))
    return f'<div class="dag-hesse">{lines}{tables}</div>'


def write_html(report: CurvatureReport, path: str | Path) -> None:
    """Write the page."""
    title = escape(f"Curvature of {report.facts['model']}")
    lines = "".join(f"<p>{escape(line)}</p>" for line in facts(report))
    tables = "".join(_table(report, metric) for metric in METRICS)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1>{lines}<div class="wide">{_svg(report)}</div>{tables}'
        "<p>± is the relative standard error of an estimate; hover a cell for its method.</p></html>\n"
    )
    write_text(path, page)
