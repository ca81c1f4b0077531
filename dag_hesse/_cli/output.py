"""What commands give: files first, since a terminal that goes away takes nothing with it; then text, or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dag_hesse.errors import WriteError
from dag_hesse.files import check_output, show, write_text

_WRITTEN = ("json", "html", "trace", "out")  # options that name what a command writes


def add_json(command: argparse.ArgumentParser) -> None:
    """The option ``--json FILE``, or ``--json -``."""
    command.add_argument("--json", metavar="FILE", help="write JSON there; '-' prints it in place of the text")


def check(options: argparse.Namespace) -> None:
    """Find out before the work whether all that a command was told to write can be written.

    Raises:
        OptionError: a folder is in place of a file.
        WriteError: a file cannot be made or replaced there, or standard output is closed.
    """
    for place in _places(options):
        check_output(place)
    silent = getattr(options, "quiet", False) and getattr(options, "json", None) != "-"
    if sys.stdout is None and not silent:
        raise WriteError("standard output is closed, and there is text for it: send it to a file, or to /dev/null.")


def _places(options: argparse.Namespace) -> Iterator[str | Path]:
    """The files; ``options.files`` are those that a command writes into a folder ``--out``."""
    for name in _WRITTEN:
        place = getattr(options, name, None)
        if place is not None and str(place) != "-":
            files = getattr(options, "files", None) if name == "out" else None
            yield from [place] if files is None else [Path(place, file) for file in files]


def give(place: str | None, data: Mapping[str, Any], text: str) -> None:
    """Write ``data`` as JSON where that is asked for, and print the text, if any; for ``-`` print JSON instead."""
    made = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    if place == "-":
        text = made
    elif place is not None:
        write_text(Path(place), made + "\n")
    if text:
        show(text)
