"""Files of the disk tier: every byte where it belongs, what an error says, and what a crash may leave behind."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.memory.files import (
    ALIGNMENT,
    DiskFile,
    OffloadError,
    align,
    chunks,
    map_all,
    prepare_offload_dir,
    write_atomically,
)
from flexbatch.memory.slab_lease import slices
from flexbatch.memory.tiers import HostArena
from flexbatch.policy.units import MIB


@given(num_bytes=st.integers(0, 100_000), count=st.integers(1, 40), chunk=st.integers(1, 5000))
def test_slices_and_chunks_cover_every_byte_once(num_bytes: int, count: int, chunk: int) -> None:
    cut = [slices(num_bytes, index, count) for index in range(count)]
    assert all(start % 256 == 0 or start == num_bytes for start, _ in cut)
    for parts in (cut, chunks(num_bytes, chunk)):
        covered = [position for start, end in parts for position in (start, end)]
        assert covered == sorted(covered) and sum(end - start for start, end in parts) == num_bytes
        assert not covered or (covered[0], covered[-1]) == (0, num_bytes)
    assert all(end - start <= chunk for start, end in chunks(num_bytes, chunk))


@settings(max_examples=40, deadline=None)
@given(
    writes=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 9000), st.booleans()), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_a_disk_file_holds_what_was_written_wherever_it_was(writes: list[tuple[int, int, bool]], seed: int) -> None:
    """Aligned requests go past the page cache, others through it: they see each other's bytes."""
    size = 32_768
    expected = torch.zeros(size, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        file = DiskFile(Path(folder) / "cache.bin", size)
        try:
            for offset, count, aligned in writes:
                if aligned:
                    offset, count = align(offset), align(count)
                count = min(count, size - offset)
                buffer = HostArena(count, False).tensor
                buffer.copy_(torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8))
                file.write(buffer, offset)
                expected[offset : offset + count] = buffer
                there = torch.empty(count + min(3, offset), dtype=torch.uint8)
                file.read(there, offset - min(3, offset))
                assert torch.equal(there, expected[offset - min(3, offset) : offset + count])
            whole = HostArena(size, False).tensor
            file.read(whole, 0)
            assert torch.equal(whole, expected)
        finally:
            file.close()


def test_a_read_past_the_end_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "w.bin", [torch.ones(ALIGNMENT, dtype=torch.uint8)], ALIGNMENT)
    os.truncate(tmp_path / "w.bin", 1000)
    file = DiskFile(tmp_path / "w.bin")
    with pytest.raises(OffloadError, match=r"w\.bin: read of 4096 bytes at 0 ended after 1000; delete the file"):
        file.read(HostArena(ALIGNMENT, False).tensor, 0)
    file.close()


def test_a_file_appears_whole_padded_and_alone(tmp_path: Path) -> None:
    path, pieces = (
        tmp_path / "layer" / "w.bin",
        [torch.arange(100, dtype=torch.uint8), torch.arange(200, dtype=torch.uint8)],
    )
    for _ in range(2):  # again over a file that is there
        write_atomically(path, pieces, 300)
        assert path.read_bytes() == bytes(range(100)) + bytes(range(200)) + bytes(ALIGNMENT - 300)
    assert [entry.name for entry in path.parent.iterdir()] == ["w.bin"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("operation", ["posix_fallocate", "pwritev", "fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, error: BaseException
) -> None:
    path = tmp_path / "w.bin"
    write_atomically(path, [torch.zeros(10, dtype=torch.uint8)], 10)

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(os, operation, fail)
    wanted = OffloadError if isinstance(error, OSError) else KeyboardInterrupt
    with ThreadPoolExecutor(2) as pool, pytest.raises(wanted) as caught:
        write_atomically(path, [torch.ones(MIB, dtype=torch.uint8)], MIB, pool)
    assert path.read_bytes() == bytes(ALIGNMENT) and list(tmp_path.iterdir()) == [path]
    if isinstance(error, OSError):
        assert caught.value.errno == errno.ENOSPC
        assert (
            "needed 1.000 MiB" in str(caught.value)
            and "iB free there" in str(caught.value)
            and "--offload-dir" in str(caught.value)
        )


def test_no_thread_writes_any_more_when_one_has_failed() -> None:
    """The descriptor is closed then, and its number may be another file's."""
    running, begun = set[int](), threading.Barrier(3)

    def work(item: int) -> None:
        running.add(item)
        if item < 3:
            begun.wait(60)
        if item == 0:
            running.discard(item)
            raise OSError("full")
        time.sleep(0.05)
        running.discard(item)

    with ThreadPoolExecutor(3) as pool:
        with pytest.raises(OSError, match="full"):
            map_all(pool, work, range(50))
        assert not running
        assert map_all(pool, str, range(9)) == map_all(None, str, range(9)) == list("012345678")


def test_a_cache_file_that_does_not_fit_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system has given a part of it when it is full (a real one would be full for everybody while this
    runs)."""

    def give_a_part(descriptor: int, offset: int, num_bytes: int) -> None:
        os.ftruncate(descriptor, num_bytes // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", give_a_part)
    with pytest.raises(OffloadError, match=r"No space left on device \(needed 1.000 MiB.*--offload-dir"):
        DiskFile(tmp_path / "cache.bin", MIB)
    assert not list(tmp_path.iterdir())


def test_an_offload_folder_is_tried_before_it_is_used(tmp_path: Path) -> None:
    prepare_offload_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OffloadError, match=r"offload folder .*file"):
        prepare_offload_dir(tmp_path / "file")


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Threads have one process id between them; so have containers, whose first process is always 1."""
    path, size = tmp_path / "w.bin", 3 * ALIGNMENT + 5

    def write(number: int) -> int:
        write_atomically(path, [torch.full((size,), number % 250, dtype=torch.uint8)], size)
        content = path.read_bytes()
        assert len(content) == align(size) and set(content[size:]) == {0}
        return len(set(content[:size]))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write, range(200))) == {1}, "a file was seen half-written, or with two contents"
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("opened", ["scratch", "to read", "to write"])
def test_an_opening_that_is_interrupted_leaves_nothing_open(
    opened: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two descriptors."""
    path = tmp_path / "file"
    path.write_bytes(bytes(64))

    def interrupted(descriptor: int, flags: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("flexbatch.memory.files.open_direct", interrupted)
    with path.open("rb+") as owner:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(KeyboardInterrupt):
            settings = {"scratch": {"num_bytes": 64}, "to read": {}, "to write": {"descriptor": owner.fileno()}}
            DiskFile(path, **settings[opened])
        assert os.listdir("/proc/self/fd") == before
        assert os.fstat(owner.fileno()).st_size == 64, "what is somebody else's stays open"


def test_scratch_files_have_no_name(tmp_path: Path) -> None:
    """A killed run leaves nothing, and nobody can open them."""
    files = [DiskFile(tmp_path / "cache", 2 * ALIGNMENT) for _ in range(3)]
    assert not list(tmp_path.iterdir())
    for number, file in enumerate(files):
        file.write(HostArena(ALIGNMENT, False).tensor.fill_(number + 1), ALIGNMENT)
    for number, file in enumerate(files):
        found = HostArena(2 * ALIGNMENT, False).tensor
        file.read(found, 0)
        assert found.tolist() == [0] * ALIGNMENT + [number + 1] * ALIGNMENT and file.num_bytes == 2 * ALIGNMENT
        file.close()
        file.close()  # again, as after a block that was closed half-way


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "missing"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "w.bin", tmp_path / "target"
    target.write_bytes(bytes(ALIGNMENT))
    make = {"link": lambda: path.symlink_to(target), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
    make.get(kind, lambda: None)()
    with pytest.raises(OffloadError, match="--offload-dir"):
        DiskFile(path)


def test_the_offload_folder_is_its_owners_alone(tmp_path: Path) -> None:
    """The probe does not go through a link that lies in wait, and a folder that is there keeps its mode."""
    prepare_offload_dir(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "old").mkdir(mode=0o755)
    (tmp_path / "old" / f".probe-{os.getpid()}").symlink_to(tmp_path / "target")
    prepare_offload_dir(tmp_path / "old")
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o755 and not (tmp_path / "target").exists()
