"""Append-only logs of checksummed records that can be read after any crash.

A log is a header ``<magic><fingerprint of the job><crc32>`` and records
``<mark><length><term><stamp><crc32 of the payload><crc32 of the record's head>`` with a payload of JSON in ASCII. Both
checksums begin with the job's fingerprint, so a record of another job, or a run of zeros, is never one of this job,
and records count even where the header in front of them was lost. The mark holds bytes that JSON in ASCII cannot, so
the next record after damaged bytes is found without any trust in lengths.

What a crash leaves at the end (a cut record, or zeros where a file had grown and its data was not written yet) is a
torn tail and simply not there. Everything else that does not check is damage: it is reported, and what follows counts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexbatch.files.atomic import sync_folder, temporary_name

logger = logging.getLogger("flexbatch")
HEADER = struct.Struct("<4s16sI")
RECORD = struct.Struct("<4sIQQII")
MAGIC, MARK = b"FBJ2", b"\xff\xfaR\xf5"
Order = tuple[int, int]
"""(term, stamp) of a record: of two about the same thing the one with the greater order is the later one."""


@dataclass(frozen=True)
class LogRecord:
    """One record: ``term`` and ``stamp`` give the order in which the values of several logs were written; the record
    takes the bytes [start, end) of its file."""

    term: int
    stamp: int
    value: Any
    start: int
    end: int


@dataclass(frozen=True)
class Scan:
    """What a log holds: whole records in the order of the file, and byte ranges that are damaged."""

    data: bytes = b""
    entries: list[LogRecord] = field(default_factory=list)
    damage: list[tuple[int, int]] = field(default_factory=list)


def _header(fingerprint: bytes) -> bytes:
    head = MAGIC + fingerprint
    return head + struct.pack("<I", zlib.crc32(head))


def _pack(value: Any, fingerprint: bytes, term: int, stamp: int) -> bytes:
    seed = zlib.crc32(fingerprint)
    payload = json.dumps(value, separators=(",", ":")).encode("ascii")
    head = RECORD.pack(MARK, len(payload), term, stamp, zlib.crc32(payload, seed), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head, seed)) + payload


def _head_at(data: bytes, offset: int, seed: int) -> tuple[int, int, int, int] | None:
    """Returns (length, term, stamp, checksum of the payload) where an undamaged head of a record lies."""
    head = data[offset : offset + RECORD.size]
    if len(head) < RECORD.size:
        return None
    mark, length, term, stamp, checksum, check = RECORD.unpack(head)
    return (length, term, stamp, checksum) if mark == MARK and check == zlib.crc32(head[:-4], seed) else None


def _record_at(data: bytes, offset: int, seed: int) -> LogRecord | None:
    head = _head_at(data, offset, seed)
    if head is None:
        return None
    length, term, stamp, checksum = head
    start = offset + RECORD.size
    payload = data[start : start + length]
    if len(payload) < length or zlib.crc32(payload, seed) != checksum:
        return None
    return LogRecord(term, stamp, json.loads(payload), offset, start + length)


def _next_record(data: bytes, offset: int, seed: int) -> int:
    """Returns where the next whole record begins, -1 where there is none."""
    while (offset := data.find(MARK, offset)) >= 0 and _record_at(data, offset, seed) is None:
        offset += 1
    return offset


def _torn(data: bytes, offset: int, written: int, seed: int) -> bool:
    """Returns whether the last record was being written: its bytes end, or only zeros follow, before it is whole. A
    payload never holds a zero byte."""
    head = _head_at(data, offset, seed)
    return written < offset + RECORD.size + (0 if head is None else head[0])


def scan_log(path: Path, fingerprint: bytes) -> Scan:
    """Returns everything that a log still holds. A file that is gone is empty; a log of another job raises
    ValueError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Scan()
    seed, written = zlib.crc32(fingerprint), len(data.rstrip(b"\0"))
    scan = Scan(data)
    head = data[: HEADER.size]
    if head != _header(fingerprint) and written >= HEADER.size:
        if head[:4] == MAGIC and HEADER.unpack(head)[2] == zlib.crc32(head[:-4]):
            raise ValueError(f"{path} is not a log of this job")
        scan.damage.append((0, HEADER.size))
    offset = HEADER.size
    while offset < written:
        if (entry := _record_at(data, offset, seed)) is not None:
            scan.entries.append(entry)
            offset = entry.end
            continue
        following = _next_record(data, offset + 1, seed)
        if following < 0 and _torn(data, offset, written, seed):
            break
        scan.damage.append((offset, following if following >= 0 else len(data)))
        offset = following if following >= 0 else written
    return scan


def report_damage(path: Path, scan: Scan) -> None:
    for start, stop in scan.damage:
        logger.warning(
            "%s: bytes %s to %s of %s are damaged. What they recorded is found out or generated again; "
            "%s whole records of this file are kept",
            path, f"{start:,}", f"{stop:,}", f"{len(scan.data):,}", f"{len(scan.entries):,}",
        )  # fmt: skip


def read_log(path: Path, fingerprint: bytes) -> Iterator[LogRecord]:
    """Yields the records of one log and reports what is damaged. Raises ValueError for a log of another job."""
    scan = scan_log(path, fingerprint)
    report_damage(path, scan)
    yield from scan.entries


class RecordLog:
    """One log, written by one process.

    ``fingerprint`` is the job's, 16 bytes. An existing log is taken over: its whole records are copied to a new file
    that replaces it, so that its torn tail is gone, and a process that still writes to the old file, because
    everybody thought it dead, writes to nobody. With ``new`` a path that exists raises FileExistsError. A log of
    another job raises ValueError.
    """

    def __init__(self, path: Path, fingerprint: bytes, *, new: bool = False) -> None:
        self.path, self.fingerprint = path, fingerprint
        scan = Scan() if new else scan_log(path, fingerprint)
        report_damage(path, scan)
        target = path if new else temporary_name(path)
        self._descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self.size, self.records, self._dirty = 0, len(scan.entries), False
        try:
            content = _header(fingerprint) + b"".join(scan.data[entry.start : entry.end] for entry in scan.entries)
            self._write(content)
            self.size = len(content)
            os.fsync(self._descriptor)
            if not new:
                os.replace(target, path)
            sync_folder(path.parent)
        except OSError:
            self.close()
            target.unlink(missing_ok=True)
            raise

    def append(self, value: Any, term: int = 0, stamp: int = 0) -> None:
        """Hands one JSON value to the operating system: it survives the death of this process. `sync` makes it survive
        the machine's. Raises OSError."""
        data = _pack(value, self.fingerprint, term, stamp)
        self._write(data)
        self.size, self.records, self._dirty = self.size + len(data), self.records + 1, True

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
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
