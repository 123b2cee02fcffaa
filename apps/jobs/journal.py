"""The journal of a job: finished rows of parts that are not committed yet, in segments of checksummed records."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexbatch.apps.jobs.records import Order, RecordLog, Scan, report_damage, scan_log

logger = logging.getLogger("flexbatch")
SEGMENT_BYTES = 64 * 2**20
"""A segment is closed at this size, and deleted once all its parts are committed."""


class Journal:
    """Finished rows of unfinished parts, in segments ``{prefix}-{owner}.{sequence}.log`` of the state folder.

    A value is ``[part, row in the part, record]``. A later process of the same owner opens new segments, never an old
    one, and takes over the old ones. A closed segment is deleted when all its parts are committed.

    Which of two records of a row is the later one, their ``term`` and then their ``stamp`` decide, and no name does:
    terms grow whenever a part gets another writer, so nothing that a writer adds after it was replaced counts against
    its successor; stamps are wall-clock nanoseconds that never go back, not even behind what `recover` has found.
    """

    def __init__(
        self, folder: Path, owner: str, fingerprint: bytes, prefix: str = "journal", segment_bytes: int = SEGMENT_BYTES,
        term: int = 0,
    ) -> None:  # fmt: skip
        self._folder, self._owner, self._prefix = folder, owner, prefix
        self._fingerprint, self._limit, self._term = fingerprint, segment_bytes, term
        self._terms: dict[int, int] = {}
        self._closed: dict[Path, set[int]] = {}
        self._active: RecordLog | None = None
        self._active_parts: set[int] = set()
        self._sequence = self._stamp = 0

    def segments(self) -> Iterator[tuple[Path, str, int, Scan]]:
        """Yields (path, owner, sequence, content) of every segment of every owner; damage is reported. A log of
        another job can only be the last write of a process that did not notice that its job was discarded: it is
        left alone."""
        for path in sorted(self._folder.glob(f"{self._prefix}-*.log")):
            name = re.fullmatch(rf"{re.escape(self._prefix)}-(.+)\.(\d+)\.log", path.name)
            if name is None:
                continue
            try:
                scan = scan_log(path, self._fingerprint)
            except ValueError as error:
                logger.warning("%s: left alone", error)
                continue
            report_damage(path, scan)
            yield path, name[1], int(name[2]), scan

    def recover(self, wanted: Callable[[int], bool]) -> dict[int, dict[int, Any]]:
        """Reads every segment of every owner. Returns part -> row in the part -> its latest record, for the parts
        that ``wanted`` names."""
        found = self.recover_ordered(wanted)
        return {part: {row: record for row, (_, record) in rows.items()} for part, rows in found.items()}

    def recover_ordered(self, wanted: Callable[[int], bool]) -> dict[int, dict[int, tuple[Order, Any]]]:
        """Does what `recover` does, and returns (order, record) in the place of records."""
        found: dict[int, dict[int, tuple[Order, Any]]] = {}
        for path, owner, sequence, scan in self.segments():
            parts: set[int] = set()
            for entry in scan.entries:
                part, row, record = entry.value
                parts.add(part)
                self._stamp = max(self._stamp, entry.stamp)
                order = entry.term, entry.stamp
                rows = found.setdefault(part, {}) if wanted(part) else None
                if rows is not None and (row not in rows or rows[row][0] <= order):
                    rows[row] = order, record
            if owner == self._owner:
                self._closed[path] = parts
                self._sequence = max(self._sequence, sequence + 1)
        return found

    def order(self, part: int) -> Order:
        """The order of the last record of this part that this process can have written: every later one is above."""
        return self._terms.get(part, self._term), self._stamp

    def lease(self, part: int, term: int) -> None:
        """From now on, records of this part are written under a term of its own."""
        self._terms[part] = term

    def append(self, part: int, row: int, record: Any) -> None:
        if self._active is None or self._active.size >= self._limit:
            self._rotate()
        assert self._active is not None
        stamp = max(self._stamp + 1, time.time_ns())
        self._active.append([part, row, record], self._terms.get(part, self._term), stamp)
        self._stamp = stamp
        self._active_parts.add(part)

    def _rotate(self) -> None:
        if self._active is not None:
            self._retire(self._active)
            self._active = None
        while self._active is None:
            path = self._folder / f"{self._prefix}-{self._owner}.{self._sequence:06d}.log"
            self._sequence += 1
            try:
                self._active = RecordLog(path, self._fingerprint, new=True)
            except FileExistsError:  # of a process that everybody thought dead
                continue
        self._active_parts = set()

    def _retire(self, log: RecordLog) -> None:
        if self._active_parts:
            log.sync()
            self._closed[log.path] = self._active_parts
        log.close()
        if not self._active_parts:
            log.path.unlink(missing_ok=True)

    def committed(self, part: int) -> None:
        """Called when the part's rows are in the output: segments that hold nothing else are removed."""
        self._terms.pop(part, None)
        self._active_parts.discard(part)
        for path, parts in list(self._closed.items()):
            parts.discard(part)
            if not parts:
                path.unlink(missing_ok=True)
                del self._closed[path]

    def sweep(self, finished: Callable[[int], bool]) -> None:
        """Removes the segments of all owners that hold only rows of finished parts. Called only where nobody else
        writes."""
        for path, _, _, scan in self.segments():
            active = self._active is not None and path == self._active.path
            if not active and all(finished(entry.value[0]) for entry in scan.entries):
                path.unlink(missing_ok=True)
                self._closed.pop(path, None)

    def sync(self) -> None:
        if self._active is not None:
            self._active.sync()

    def close(self) -> None:
        """Closes the files and removes an active segment without open parts."""
        if self._active is not None:
            log, self._active = self._active, None
            self._retire(log)
