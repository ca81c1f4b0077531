"""What is written over files, links, pipes and what is none of these."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from dag_hesse.errors import OptionError, WriteError
from dag_hesse.files import check_output, write_text, write_whole


@contextmanager
def read_from(pipe: Path) -> Iterator[list[bytes]]:
    """What a reader of the pipe has got, when this is left."""
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    yield got
    reader.join(timeout=30)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_pipe_is_written_to_and_stays_one(pipe: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pipe)
    for place in (pipe, tmp_path / "link"):
        with read_from(pipe) as got:
            write_text(place, "§ text")
        assert got == ["§ text".encode()]
        assert stat.S_ISFIFO(os.lstat(pipe).st_mode) and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_what_needs_a_file_of_its_own_goes_through_a_pipe_too(pipe: Path) -> None:
    tensors = {"x": torch.arange(50_000.0)}  # more than a pipe holds
    with read_from(pipe) as got:
        write_whole(pipe, lambda place: save_file(tensors, place))
    assert torch.equal(load(got[0])["x"], tensors["x"])


def test_nothing_goes_through_a_pipe_where_writing_fails(pipe: Path, tmp_path: Path) -> None:
    def interrupted(place: Path) -> None:
        place.write_text("half")
        raise KeyboardInterrupt

    with read_from(pipe) as got:
        with pytest.raises(KeyboardInterrupt):
            write_whole(pipe, interrupted)
        pipe.write_text("all that there is")
    assert got == [b"all that there is"]


def test_a_reader_that_goes_away_is_a_typed_error(pipe: Path) -> None:
    opened = threading.Thread(target=lambda: open(pipe, "rb").close(), daemon=True)
    opened.start()
    with pytest.raises(WriteError, match="pipe cannot be written: Broken pipe"):
        write_text(pipe, "x" * 1_000_000)
    opened.join(timeout=30)


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    target, link, chain = tmp_path / "there" / "target.txt", tmp_path / "link", tmp_path / "chain"
    link.symlink_to(Path("there") / "target.txt")
    chain.symlink_to(link)
    for text in ("nothing was there", "something was there"):
        write_text(chain, text)
        assert target.read_text() == text and not target.is_symlink()
        assert link.is_symlink() and chain.is_symlink()
    assert os.listdir(target.parent) == ["target.txt"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o755])
def test_a_file_keeps_its_mode_and_its_owner(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "chown", lambda name, user, group: owners.append((user, group)))
    (tmp_path / "a").touch()
    (tmp_path / "a").chmod(mode)
    seen: list[int] = []

    def write(place: Path) -> None:
        seen.append(stat.S_IMODE(place.stat().st_mode))
        place.unlink()
        place.write_text("a file of its own, as safetensors makes")

    write_whole(tmp_path / "a", write)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    assert seen[0] & ~mode == 0  # what is private is never open to others, while it is written neither
    assert owners == []
    real = os.stat(tmp_path / "a")
    other = os.stat_result((*real[:4], real.st_uid + 1, real.st_gid, *real[6:]))
    monkeypatch.setattr("dag_hesse.files._status", lambda path: other)
    write_whole(tmp_path / "a", write)
    assert owners == [(real.st_uid + 1, real.st_gid)]


def _folder(place: Path) -> None:
    place.mkdir()


def _file_on_the_way(place: Path) -> None:
    place.parent.rmdir()
    place.parent.touch()


def _links_in_a_circle(place: Path) -> None:
    place.symlink_to(place)


def _link_past_a_file(place: Path) -> None:
    (place.parent / "file").touch()
    place.symlink_to(place.parent / "file" / "a")


def _name_without_end(place: Path) -> None:
    place.parent.joinpath("a" * 250).symlink_to("b" * 300)
    place.symlink_to("a" * 250)


@pytest.mark.parametrize(
    ("obstacle", "kind", "told"),
    [
        (_folder, OptionError, "no file's name"),
        (_file_on_the_way, WriteError, "Not a directory"),
        (_links_in_a_circle, WriteError, "Too many levels of symbolic links"),
        (_link_past_a_file, WriteError, "Not a directory"),
        (_name_without_end, WriteError, "File name too long"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_made(
    obstacle: Callable[[Path], None], kind: type[Exception], told: str, tmp_path: Path
) -> None:
    place = tmp_path / "folder" / "a.txt"
    place.parent.mkdir()
    obstacle(place)
    before = sorted(tmp_path.rglob("*"))
    for attempt in (check_output, lambda path: write_whole(path, pytest.fail)):
        with pytest.raises(kind, match=told):
            attempt(place)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_may_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    # Root may write to everything, whatever its mode says.
    for forbidden, place in (("file", "file"), ("", "file"), ("", "new/folder/file")):
        closed = str(tmp_path / forbidden).rstrip("/")
        monkeypatch.setattr(os, "access", lambda path, mode, closed=closed: str(path) != closed)
        with pytest.raises(WriteError, match=f"{place} cannot be written: Permission denied"):
            check_output(tmp_path / place)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("path", ["", ".", "a\0b", None, 3])
def test_what_names_no_file_is_told(path: object) -> None:
    with pytest.raises(OptionError, match="path"):
        check_output(path)  # type: ignore[arg-type]
