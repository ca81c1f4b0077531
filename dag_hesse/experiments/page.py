"""What an experiment leaves: figures as PNG, tables as Markdown, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from dag_hesse.experiments.protocol import Experiment, Findings
from dag_hesse.experiments.results import Published, Results
from dag_hesse.experiments.tables import as_html, as_markdown, as_text, claims_html, claims_markdown, claims_text
from dag_hesse.figures import save_figure
from dag_hesse.files import write_text

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 0.5rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: 0.15rem 0.7rem; border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent) }}
th, td {{ text-align: left }}
tr.far {{ background: color-mix(in srgb, orange 22%, transparent) }}
img {{ max-width: 100%; background: white }}
</style></head><body>
{body}
</body></html>
"""


def what_ran(experiment: Experiment, results: Results) -> list[str]:
    """The facts that every table stands under: data, seeds, checkpoints, what a quick run leaves out, versions."""
    header = results.header
    data = header["data"]
    lines = [
        f"{experiment.section}. Data: {data['name']}" + (f" ({data['note']})" if data["note"] else "") + ".",
        f"Seeds {', '.join(map(str, results.seeds))}; measured at {', '.join(results.checkpoints)}; "
        f"{results.seconds / 60:.1f} minutes.",
    ]
    if header["protocol"] == "quick":
        whose = "the paper's" if experiment.paper else "the full"
        lines.append(f"Quick run, not {whose} protocol: {experiment.quick}")
    if "epochs" in header:
        lines.append(f"Trained for {header['epochs']} epochs at most, over which the learning rate falls to zero.")
    return [*lines, "; ".join(f"{name} {value}" for name, value in results.versions.items()) + "."]


def findings(experiment: Experiment, results: Results) -> Findings:
    """Beside the paper's."""
    return Findings(results, Published.of(experiment.name))


def as_report(experiment: Experiment, results: Results) -> str:
    """What is printed."""
    found = findings(experiment, results)
    parts = [f"{experiment.name}: {experiment.title}", *what_ran(experiment, results)]
    tables = [f"\n{as_text(table)}" for table in experiment.tables(found) if table.rows]
    return "\n".join([*parts, *tables, "", claims_text(experiment.claims(found))])


def write(experiment: Experiment, results: Results, folder: Path) -> None:
    """``tables.md``, a PNG a figure, and ``index.html``.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    found = findings(experiment, results)
    tables, claims = [table for table in experiment.tables(found) if table.rows], experiment.claims(found)
    facts, drawn = what_ran(experiment, results), experiment.figures(found)
    markdown = [f"## {experiment.title}", *facts, claims_markdown(claims), *map(as_markdown, tables)]
    write_text(folder / "tables.md", "\n\n".join([*markdown, *experiment.remarks]) + "\n")
    parts = [f"<h1>{html.escape(experiment.title)}</h1>", *(f"<p>{html.escape(fact)}</p>" for fact in facts)]
    parts.append(claims_html(claims))
    for name, figure in drawn.items():
        save_figure(figure, folder / f"{name}.png")
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        parts.append(f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{picture}"></p>')
    parts += [as_html(table) for table in tables]
    parts += [f"<p>{html.escape(remark)}</p>" for remark in experiment.remarks]
    if found.paper.source:
        parts.append(f"<p>{html.escape(found.paper.source)}</p>")
    write_text(folder / "index.html", _PAGE.format(title=html.escape(experiment.title), body="\n".join(parts)))
