"""Append-only logs of checksummed records: what a job has finished and not yet committed.

A record is ``<length: u32><crc32: u32><payload>``, after a header that names the job's fingerprint. A process that dies in the middle of a
record leaves a torn tail; reading stops there, and everything before it counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEADER = struct.Struct("<4s16s")
RECORD = struct.Struct("<II")
MAGIC = b"FBJ1"
SEGMENT_BYTES = 64 * 2**20
"""A segment is closed at this size, and deleted once all its parts are committed."""


class RecordLog:
    """One file of records, written by one process.

    ``fingerprint`` is the job's, 16 bytes. Opening an existing file cuts off its torn tail and goes on behind it; a file of another job raises ValueError.
    """

    def __init__(self, path: Path, fingerprint: bytes) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.size = HEADER.size
        self.records = 0
        if path.exists() and path.stat().st_size >= HEADER.size:
            for _, end in _scan(path, fingerprint):
                self.size, self.records = end, self.records + 1
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._descriptor, self.size if self.records else 0)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        if not self.records:
            self._write(HEADER.pack(MAGIC, fingerprint))
        self._dirty = True

    def append(self, value: Any) -> None:
        """Hands one JSON value to the operating system: it survives the death of this process. `sync` makes it survive the machine's. Raises OSError."""
        payload = json.dumps(value, separators=(",", ":")).encode()
        self._write(RECORD.pack(len(payload), zlib.crc32(payload)) + payload)
        self.size, self.records, self._dirty = self.size + RECORD.size + len(payload), self.records + 1, True

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            if self.records:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self.size)
                    os.lseek(self._descriptor, 0, os.SEEK_END)
            raise

    def sync(self) -> None:
        """Makes every record so far durable."""
        if self._dirty:
            os.fdatasync(self._descriptor)
            self._dirty = False

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def check(self) -> None:
        """Asserts that the file holds exactly the records that were appended."""
        found = list(_scan(self.path, self.fingerprint))
        end = found[-1][1] if found else HEADER.size
        on_disk = self.path.stat().st_size
        assert len(found) == self.records and end == self.size == on_disk, (
            f"{self.path}: {len(found)} records, {on_disk} bytes; expected {self.records}, {self.size}"
        )


def _scan(path: Path, fingerprint: bytes) -> Iterator[tuple[Any, int]]:
    with path.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            return
        if head != HEADER.pack(MAGIC, fingerprint):
            raise ValueError(f"{path} is not a log of this job")
        end = HEADER.size
        while len(head := file.read(RECORD.size)) == RECORD.size:
            length, checksum = RECORD.unpack(head)
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload) != checksum:
                return
            end += RECORD.size + length
            yield json.loads(payload), end


def read_log(path: Path, fingerprint: bytes) -> Iterator[Any]:
    """The values of one log up to its end or its torn tail. Raises ValueError for a log of another job."""
    for value, _ in _scan(path, fingerprint):
        yield value


class Journal:
    """Finished rows of unfinished parts, in segments ``{prefix}-{owner}.{sequence}.log`` of the state folder.

    A value is ``[part, row in the part, record]``. One process writes under one owner name; a later process of the same owner opens a new segment
    and takes over the old ones. A closed segment is deleted when all its parts are committed.
    """

    def __init__(self, folder: Path, owner: str, fingerprint: bytes, prefix: str = "journal", segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder, self._owner, self._prefix, self._fingerprint, self._limit = folder, owner, prefix, fingerprint, segment_bytes
        self._closed: dict[Path, set[int]] = {}
        self._active: RecordLog | None = None
        self._active_parts: set[int] = set()
        self._sequence = 0

    def recover(self, wanted: Callable[[int], bool]) -> dict[int, dict[int, Any]]:
        """Reads every segment of every owner: part -> row in the part -> record, for the parts that ``wanted`` names. Later records win."""
        found: dict[int, dict[int, Any]] = {}
        for path in sorted(self._folder.glob(f"{self._prefix}-*.log")):
            parts: set[int] = set()
            for part, row, record in read_log(path, self._fingerprint):
                parts.add(part)
                if wanted(part):
                    found.setdefault(part, {})[row] = record
            owner, sequence = path.name[len(self._prefix) + 1 : -len(".log")].rsplit(".", 1)
            if owner == self._owner:
                self._closed[path] = parts
                self._sequence = max(self._sequence, int(sequence) + 1)
        return found

    def append(self, part: int, row: int, record: Any) -> None:
        if self._active is None or self._active.size >= self._limit:
            self._rotate()
        assert self._active is not None
        self._active.append([part, row, record])
        self._active_parts.add(part)

    def _rotate(self) -> None:
        if self._active is not None:
            self._active.sync()
            self._active.close()
            self._closed[self._active.path] = self._active_parts
        self._active = RecordLog(self._folder / f"{self._prefix}-{self._owner}.{self._sequence:06d}.log", self._fingerprint)
        self._sequence, self._active_parts = self._sequence + 1, set()

    def committed(self, part: int) -> None:
        """The part's rows are in the output: segments that hold nothing else go."""
        self._active_parts.discard(part)
        for path, parts in list(self._closed.items()):
            parts.discard(part)
            if not parts:
                path.unlink(missing_ok=True)
                del self._closed[path]

    def sync(self) -> None:
        if self._active is not None:
            self._active.sync()

    def close(self) -> None:
        """Closes the files; an active segment without open parts goes too."""
        if self._active is not None:
            if self._active_parts:
                self._active.sync()
            self._active.close()
            if not self._active_parts:
                self._active.path.unlink(missing_ok=True)
            self._active = None

    def check(self) -> None:
        """Asserts that the active segment holds exactly what was appended and that no finished segment was left behind."""
        if self._active is not None:
            self._active.check()
        for path, parts in self._closed.items():
            assert parts and path.exists(), f"{path} holds no part in flight and should be gone"
