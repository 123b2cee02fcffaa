"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest

from flexbatch.files.atomic import open_locked, remove_leftovers, replacing, temporary_name


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("failure", [None, ValueError, OSError, KeyboardInterrupt])
def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, failure: type[BaseException] | None, durable: bool) -> None:
    path = tmp_path / "a [1].json"
    path.write_text("before")
    try:
        with replacing(path, durable=durable) as file:
            file.write(b"after")
            assert path.read_text() == "before"
            if failure is not None:
                raise failure
    except (ValueError, OSError, KeyboardInterrupt) as error:
        assert type(error) is failure
    assert path.read_text() == ("after" if failure is None else "before")
    assert list(tmp_path.iterdir()) == [path], "a temporary file was left"


@pytest.mark.parametrize(
    ("mode", "umask", "expected"), [(0o666, 0o022, 0o644), (0o600, 0o022, 0o600), (0o666, 0, 0o666)]
)
def test_permissions_are_those_that_were_asked_for(tmp_path: Path, mode: int, umask: int, expected: int) -> None:
    path, before = tmp_path / "a", os.umask(umask)
    try:
        with replacing(path, mode) as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == expected


def test_a_folder_that_cannot_be_written_to_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, error in (("none", FileNotFoundError), ("file", NotADirectoryError)):
        with pytest.raises(error), replacing(tmp_path / folder / "a"):
            pytest.fail("the body ran")


def test_a_leftover_of_a_killed_writer_goes_and_the_work_of_a_living_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    (tmp_path / ".w.bin.1.tmp").write_bytes(b"left by process 1 of a container that was killed")
    mine = temporary_name(path)
    with open_locked(mine) as file:
        file.write(b"living")
        with replacing(path) as other:
            other.write(b"whole")
        remove_leftovers(path)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([mine.name, path.name])
    remove_leftovers(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder", "pipe", "locked"])
def test_a_name_that_is_taken_is_never_opened(tmp_path: Path, kind: str) -> None:
    """Not even emptied: what was there stays as it was."""
    name, target = tmp_path / ".w.bin.0.tmp", tmp_path / "target"
    target.write_text("kept")
    if kind in ("file", "locked"):
        os.link(target, name)
    elif kind == "folder":
        name.mkdir()
    elif kind == "pipe":
        os.mkfifo(name)
    else:
        name.symlink_to(target if kind == "link" else tmp_path / "nothing")
    with target.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX if kind == "locked" else fcntl.LOCK_UN)
        with pytest.raises(FileExistsError):
            open_locked(name)
        remove_leftovers(tmp_path / "w.bin")
    assert target.read_text() == "kept" and not (tmp_path / "nothing").exists()


def test_a_temporary_file_that_was_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody sees it between its making and its lock. Who had it open by then may not remove its successor."""
    path, lock = tmp_path / "w.bin", fcntl.flock
    name, early = temporary_name(path), []

    def late(file: object, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        early.append(os.open(name, os.O_RDWR))
        remove_leftovers(path)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with open_locked(name) as file:
        opened = os.dup(early[0])
        monkeypatch.setattr(os, "open", lambda *arguments: opened)
        remove_leftovers(path)
        monkeypatch.undo()
        assert name.exists() and os.path.samestat(os.fstat(file.fileno()), name.stat())
    os.close(early[0])
