"""The log of commits: what each committed part holds, in one log of records per writer."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from flexbatch.apps.jobs.records import Order, read_log
from flexbatch.apps.jobs.results import Output, RowRecord

logger = logging.getLogger("flexbatch")


@dataclass(frozen=True)
class Commit:
    """The counts of one committed part."""

    part: int
    rows: int
    errors: int
    input_tokens: int
    generated_tokens: int

    @classmethod
    def of(cls, part: int, records: Collection[RowRecord], output: Output) -> Commit:
        """Counts the records of a part."""
        tokens = [output.tokens_of(record) for record in records]
        errors = sum(bool(output.error_of(record)) for record in records)
        return cls(part, len(records), errors, sum(used for used, _ in tokens), sum(made for _, made in tokens))


NOBODY_KNOWS: Order = 2**64 - 1, 2**64 - 1
"""The order of a commit that was not recorded when the part was written: no record of a journal is later."""

Identity = tuple[int, int]
"""Size in bytes of a part's file and the time of its last change in ns. Copying a folder may change the time: then
the part is read."""


def identity(path: Path) -> Identity | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def read_commits(state: Path, digest: bytes) -> dict[int, dict[Identity, tuple[Commit, Order]]]:
    """Maps each part to what the files that were ever written for it hold, and the order of the last record of the
    journal that is in each. A record says what one file holds, not that it is the one in use: a process may have died
    between writing the record and giving the file its name."""
    found: dict[int, dict[Identity, tuple[Commit, Order]]] = {}
    names = [field.name for field in fields(Commit)]
    for path in sorted(state.glob("commits-*.log")):
        try:
            for entry in read_log(path, digest):
                commit = Commit(**{name: entry.value[name] for name in names})
                written = entry.value["bytes"], entry.value["mtime_ns"]
                found.setdefault(commit.part, {})[written] = commit, (entry.term, entry.stamp)
        except ValueError as error:
            logger.warning("%s: left alone", error)
    return found
