"""Offload folders that cannot be used: one clear error, the right exit code, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flexbatch.memory.files import prepare_offload_dir
from flexbatch.planner import loader

Command = Callable[..., int]
WEIGHTS_ON_DISK = ("--percent", "0", "0", "100", "0", "100", "0", "--prompt-len", "5")
CACHE_ON_DISK = ("--percent", "100", "0", "0", "0", "100", "0", "--prompt-len", "5")


def error_of(capsys: pytest.CaptureFixture) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("words", [WEIGHTS_ON_DISK, CACHE_ON_DISK], ids=["weights", "cache"])
def test_a_read_only_folder_is_a_usage_error(
    command: Command, small_disk: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert command("--offload-dir", str(small_disk / "offload"), *words) == 2
    message = error_of(capsys)
    assert (
        f"--offload-dir {small_disk}/offload: nothing can be made in {small_disk}: Read-only file system" in message
        and "name a folder that can be written" in message
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_usage_error(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tmp_path.chmod(0o555)
    assert command("--offload-dir", str(tmp_path / "offload"), *WEIGHTS_ON_DISK) == 2
    assert "Permission denied" in error_of(capsys)
    tmp_path.chmod(0o755)


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(
    command: Command, small_disk: Path, capsys: pytest.CaptureFixture
) -> None:
    (small_disk / "filler").write_bytes(bytes(2 * 2**20 - 12 * 4096))
    assert command("--offload-dir", str(small_disk), *WEIGHTS_ON_DISK) == 4
    message = error_of(capsys)
    assert "does not fit" in message and "on the disk of --offload-dir, or name a folder" in message
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("words", [WEIGHTS_ON_DISK, CACHE_ON_DISK], ids=["weights", "cache"])
def test_a_disk_that_fills_up_meanwhile_ends_the_run_and_not_the_next(
    command: Command,
    small_disk: Path,
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else takes the room after it was counted."""
    filler = small_disk / "filler"

    def fill(folder: Path) -> None:
        prepare_offload_dir(folder)
        if filler.exists():
            return
        space = os.statvfs(small_disk)
        filler.write_bytes(bytes((space.f_bavail - 10) * space.f_frsize))

    monkeypatch.setattr(loader, "prepare_offload_dir", fill)
    assert command("--offload-dir", str(small_disk / "offload"), *words) == 4
    message = error_of(capsys)
    assert "No space left on device" in message and "free there" in message and "--offload-dir" in message
    # A checkpoint that is some seconds old, as it is on a busy machine, has its digests kept, too.
    files = [path for path in (small_disk / "offload").rglob("*") if path.is_file()]
    left = [path for path in files if path.parent.name != "digests"]
    assert all(path.name.endswith(".bin") and not path.name.startswith((".", "cache")) for path in left), left
    monkeypatch.setattr(loader, "prepare_offload_dir", prepare_offload_dir)
    filler.unlink()
    assert command("--offload-dir", str(small_disk / "offload"), *words) == 0
