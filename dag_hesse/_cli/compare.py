"""``dag-hesse compare BEFORE AFTER``: two saved reports, with their differences in standard errors."""

from __future__ import annotations

import argparse
from math import isfinite
from pathlib import Path
from typing import Any

from dag_hesse._cli.output import add_json, give
from dag_hesse.estimate import METRICS
from dag_hesse.report import Comparison, load

_ROWS = 20


def add(commands: Any) -> None:
    """The command."""
    command = commands.add_parser(
        "compare",
        help="say what differs between two saved reports",
        description="Two reports that analyze --out or report.save() wrote: what changed, in standard errors.",
        epilog="example:\n  dag-hesse compare before/report.safetensors after/report.safetensors --html changes.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("before", type=Path, metavar="BEFORE", help="a report.safetensors")
    command.add_argument("after", type=Path, metavar="AFTER", help="another one, of the same points")
    command.add_argument("--metric", choices=METRICS, default="resonance", help="(default: %(default)s)")
    command.add_argument("--html", type=Path, metavar="FILE", help="write AFTER's page, which shows BEFORE beside it")
    add_json(command)
    command.set_defaults(run=compare)


def compare(options: argparse.Namespace) -> None:
    """Hold the one against the other."""
    before, after = load(options.before), load(options.after)
    found = before.compare(after)
    if options.html:
        after.to_html(options.html, against=before)
    give(options.json, _data(found), _text(found, options.metric))


def _data(found: Comparison) -> dict[str, Any]:
    """Every metric's rows; what is not finite is None, and ``changed`` says which exact figures differ."""

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        numbers = {key: value if isinstance(value, str) or isfinite(value) else None for key, value in row.items()}
        return {**numbers, "changed": row["score"] != 0 and row["score"] == row["score"]}

    metrics = {metric: [plain(row) for row in found.rows(metric)] for metric in METRICS}
    return {"names": list(found.names), "missing": list(found.missing), "metrics": metrics}


def _text(found: Comparison, metric: str) -> str:
    rows = found.rows(metric)
    lines = [f"{metric}: before, after, difference in standard errors"]
    wide = max(len(f"{row['v']} – {row['w']}") for row in rows[:_ROWS])
    for row in rows[:_ROWS]:
        pair = f"{row['v']} – {row['w']}".ljust(wide)
        lines.append(f"{pair}  {row['before']:>10.4g}  {row['after']:>10.4g}  {row['score']:>+8.1f}")
    if len(rows) > _ROWS:
        lines.append(f"… and {len(rows) - _ROWS} pairs that differ less (--json has all)")
    if found.missing:
        lines.append(f"in one of the reports alone: {', '.join(found.missing)}")
    return "\n".join(lines)
