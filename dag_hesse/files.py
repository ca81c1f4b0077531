"""Files, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from dag_hesse.errors import OptionError, WriteError


def check_path(path: object) -> None:
    """Raise :class:`OptionError` for what names no file."""
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"path is a {type(path).__name__}; expected a file's name.")
    if not os.fspath(path) or Path(path).is_dir():
        raise OptionError(f"path={os.fspath(path)!r} is no file's name; expected one, as 'report.json'.")


def write_whole(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary file beside ``path`` and move it there only when it is complete."""
    check_path(path)
    path = Path(path)
    name = path.parent / f".{path.name}.{secrets.token_hex(4)}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less what the umask takes away
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror}. Name a file in a folder that can be.") from error
    mode = name.stat().st_mode
    try:
        write(name)
        name.chmod(mode)  # safetensors puts a file of its own there
        with open(name, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""

    def write(place: Path) -> None:
        place.write_text(text, encoding="utf-8")

    write_whole(path, write)
