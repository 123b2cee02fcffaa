"""The log of commits: what each committed part holds, in one log of records per writer."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from flexbatch.apps.jobs.records import read_log
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


Identity = tuple[int, int]
"""Size in bytes of a part's file and the time of its last change in ns. Copying a folder may change the time: then
the part is read."""


def identity(path: Path) -> Identity | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def read_commits(state: Path, digest: bytes) -> dict[int, dict[Identity, Commit]]:
    """Maps each part to what the files that were ever written for it hold. A record says what one file holds, not
    that it is the one in use: a process may have died between writing the record and giving the file its name."""
    found: dict[int, dict[Identity, Commit]] = {}
    names = [field.name for field in fields(Commit)]
    for path in sorted(state.glob("commits-*.log")):
        try:
            for record in read_log(path, digest):
                commit = Commit(**{name: record[name] for name in names})
                found.setdefault(commit.part, {})[record["bytes"], record["mtime_ns"]] = commit
        except ValueError as error:
            logger.warning("%s: left alone", error)
    return found
