"""Files, written whole or not at all; pipes and devices, written to as they are."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dag_hesse.errors import OptionError, WriteError, kind_of


def check_path(path: object) -> None:
    """Raise :class:`OptionError` for what names no file."""
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"path is {kind_of(path)}; expected a file's name.")
    if not os.fspath(path) or "\0" in os.fspath(path) or os.path.isdir(path):
        raise OptionError(f"path={os.fspath(path)!r} is no file's name; expected one, as 'report.json'.")


def check_output(path: str | Path) -> None:
    """Find out before the work whether a file can be written there; nothing is made.

    Raises:
        OptionError: that is no file's name.
        WriteError: something on the way there is no folder, or may not be written to.
    """
    check_path(path)
    try:
        found = _status(path)
    except OSError as error:  # a file in place of a folder, links in a circle, a folder that may not be entered
        raise _refused(path, error) from error
    target = Path(os.path.realpath(path))
    folder = next(parent for parent in target.parents if parent.exists())
    stream = found is not None and not stat.S_ISREG(found.st_mode)
    if (found is not None and not os.access(path, os.W_OK)) or not (stream or os.access(folder, os.W_OK | os.X_OK)):
        raise _refused(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def write_whole(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary file beside ``path`` and move it there only when it is complete.

    A symbolic link stays, and what it points to is replaced; a file that was there keeps its mode. A pipe or a
    device has no content to keep, so what was written is poured into it.
    """
    check_output(path)
    found = _status(path)
    if found is None or (stat.S_ISREG(found.st_mode) and not _open_already(found)):
        _replace(path, Path(os.path.realpath(path)), found, write)
    else:
        _pour(path, found, write)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""

    def write(place: Path) -> None:
        place.write_text(text, encoding="utf-8")

    write_whole(path, write)


def show(text: str, end: str = "\n") -> None:
    """Print at once.

    Raises:
        WriteError: standard output is closed or full. A reader that has gone away is a ``BrokenPipeError`` as ever.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WriteError(
            f"standard output cannot be written: {error.strerror}. Send it to a file or a terminal that can be."
        ) from error


def _status(path: str | Path) -> os.stat_result | None:
    """Of what is there, behind all links; None where nothing is."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _refused(path: str | Path, error: OSError) -> WriteError:
    return WriteError(f"{path} cannot be written: {error.strerror}. Name a file in a folder that can be.")


def _open_already(found: os.stat_result) -> int | None:
    """The descriptor of standard output or standard error, where it is this file: /dev/stdout, sent to a file."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it is closed
            if os.path.samestat(os.fstat(descriptor), found):
                return descriptor
    return None


def _pour(path: str | Path, found: os.stat_result, write: Callable[[Path], None]) -> None:
    """Make the file elsewhere, since libraries seek in what they write, and copy it into what is there."""
    with tempfile.TemporaryDirectory(prefix="dag-hesse-") as folder:
        place = Path(folder, f"poured{Path(path).suffix}")
        write(place)
        try:
            with open(place, "rb") as made, open(_descriptor(path, found), "wb") as stream:
                shutil.copyfileobj(made, stream)
        except OSError as error:
            raise _refused(path, error) from error


def _descriptor(path: str | Path, found: os.stat_result) -> int:
    own = _open_already(found)
    if own is None:
        return os.open(path, os.O_WRONLY)
    if sys.stdout is not None:
        sys.stdout.flush()
    return os.dup(own)  # goes on where it has come to: opened anew, it would begin at the file's first byte


def _replace(path: str | Path, target: Path, found: os.stat_result | None, write: Callable[[Path], None]) -> None:
    """Write beside ``target``, then take its name; ``path`` is what the user called it."""
    name = target.parent / f".{target.name}.{secrets.token_hex(4)}{Path(path).suffix}"
    mode = 0o666 if found is None else stat.S_IMODE(found.st_mode)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))  # less what the umask takes away
    except OSError as error:
        raise _refused(path, error) from error
    if found is None:
        mode = stat.S_IMODE(name.stat().st_mode)
    try:
        write(name)
        _give(name, found, mode)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        os.replace(name, target)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def _give(name: Path, found: os.stat_result | None, mode: int) -> None:
    """The owner, as far as this process may, and the mode; safetensors puts a file of its own there."""
    made: Any = name.stat()
    if found is not None and (made.st_uid, made.st_gid) != (found.st_uid, found.st_gid):
        with suppress(OSError, AttributeError):  # only root may; Windows has no owners
            os.chown(name, found.st_uid, found.st_gid)
    name.chmod(mode)
