"""Tables of ours beside the paper's, as text, Markdown and HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from dag_hesse.experiments.protocol import SEEDS, Claim, Row, Table
from dag_hesse.experiments.results import Stat
from dag_hesse.theory.text import table as plain


def heads(table: Table) -> list[str]:
    """Of the columns: the labels, ours, and what that is held against."""
    if table.against is None:
        return [*table.heads, "found"]
    if table.against != "paper":
        return [*table.heads, "found", table.against]
    return [*table.heads, "ours", "paper", "deviation (paper's std)"]


def number(value: float) -> str:
    """Four figures; small and large ones with an exponent.

    >>> number(0.12345), number(6.7e-8), number(0.0)
    ('0.1235', '6.7e-08', '0')
    """
    if value == 0:
        return "0"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def shown(stat: Stat | None) -> str:
    """Mean ± std, and of how many seeds where these are not the paper's five.

    >>> shown(Stat(0.5, 0.25)), shown(Stat(0.5, 0.25, 2)), shown(Stat(0.5, 0.0, 1)), shown(Stat(0.0, 0.0)), shown(None)
    ('0.5 ± 0.25', '0.5 ± 0.25 (2 seeds)', '0.5 (1 seed)', 'exactly 0', '–')
    """
    if stat is None:
        return "–"
    if stat.mean == 0 and stat.std == 0:
        return "exactly 0"
    if stat.std is None:
        return number(stat.mean)
    seeds = "" if stat.count == len(SEEDS) else f" ({stat.count} seed{'s' if stat.count > 1 else ''})"
    return f"{number(stat.mean)}{f' ± {stat.std:.2g}' if stat.count > 1 else ''}{seeds}"


def cells(table: Table, row: Row) -> list[str]:
    """A row as text."""
    away = row.deviation
    found = [shown(row.ours), shown(row.paper), "–" if away is None else f"{away:+.1f}"]
    return [*row.labels, *found][: len(heads(table))]


def verdict(claim: Claim) -> str:
    """yes, no, or that nothing was measured."""
    return "not measured" if claim.holds is None else "yes" if claim.holds else "no"


def as_text(table: Table) -> str:
    """For a terminal."""
    body = plain(heads(table), [cells(table, row) for row in table.rows])
    return "\n".join([table.title, body, *([table.note] if table.note else [])])


def claims_text(claims: Sequence[Claim]) -> str:
    """For a terminal."""
    return "\n".join(f"[{verdict(claim)}] {claim.text}: {claim.found}" for claim in claims)


def as_markdown(table: Table) -> str:
    """For documentation."""
    body = _markdown(heads(table), (cells(table, row) for row in table.rows))
    return "\n\n".join([f"### {table.title}", body, *([table.note] if table.note else [])])


def claims_markdown(claims: Sequence[Claim]) -> str:
    """For documentation."""
    return _markdown(("claim", "found", "holds"), ((c.text, c.found, verdict(c)) for c in claims))


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_html(table: Table) -> str:
    """For the page; deviations above 2 are marked."""
    rows = (
        (cells(table, row), ' class="far"' if row.deviation is not None and abs(row.deviation) > 2 else "")
        for row in table.rows
    )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h3>{html.escape(table.title)}</h3>\n{_html(heads(table), rows)}\n{note}"


def claims_html(claims: Sequence[Claim]) -> str:
    """For the page."""
    rows = (((c.text, c.found, verdict(c)), ' class="far"' if c.holds is False else "") for c in claims)
    return _html(("claim", "found", "holds"), rows)


def _html(head: Sequence[str], rows: Iterable[tuple[Sequence[str], str]]) -> str:
    def line(tag: str, texts: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)

    body = "\n".join(f"<tr{mark}>{line('td', texts)}</tr>" for texts, mark in rows)
    return f"<table>\n<thead><tr>{line('th', head)}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
