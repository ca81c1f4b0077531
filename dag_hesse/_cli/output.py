"""What commands give: files first, since a terminal that goes away takes nothing with it; then text, or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dag_hesse.files import write_text


def add_json(command: argparse.ArgumentParser) -> None:
    """The option ``--json FILE``, or ``--json -``."""
    command.add_argument("--json", metavar="FILE", help="write JSON there; '-' prints it in place of the text")


def give(place: str | None, data: Mapping[str, Any], text: str) -> None:
    """Write ``data`` as JSON where that is asked for, and print the text, if any; for ``-`` print JSON instead."""
    made = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    if place == "-":
        text = made
    elif place is not None:
        write_text(Path(place), made + "\n")
    if text:
        print(text)
