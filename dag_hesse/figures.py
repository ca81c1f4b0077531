"""Figures of matplotlib, which is optional: made without a window, saved whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dag_hesse.errors import DependencyError, OptionError
from dag_hesse.files import check_output, write_whole


def new_figure(layout: Any = "constrained", **options: Any) -> Any:
    """A figure of no window.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError("plots need matplotlib: pip install 'dag-hesse[plot]'.") from error
    return Figure(layout=layout, **options)


def check_figure(path: str | Path) -> None:
    """Raise :class:`OptionError` where no figure can be saved under such a name."""
    check_output(path)
    known, ending = new_figure().canvas.get_supported_filetypes(), Path(path).suffix[1:].lower()
    if ending not in known:
        raise OptionError(f"'{path}' ends in '.{ending}'; expected one of {', '.join(f'.{name}' for name in known)}.")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure, whole or not at all; the same figure is the same bytes, and text in a PDF stays text."""
    import matplotlib

    check_figure(path)
    date = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(Path(path).suffix.lower())
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "dag-hesse"}):
        write_whole(path, lambda place: figure.savefig(place, dpi=130, metadata=date))
