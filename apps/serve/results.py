"""The files of a batch that has ended: the responses of its lines in their order, and those that have an error."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.openai_responses import json_line
from flexbatch.apps.jobs.results import RowRecord
from flexbatch.apps.jobs.runner import Shard
from flexbatch.apps.jobs.sources import read_parts
from flexbatch.apps.serve.state import Body, ServerState
from flexbatch.files.atomic import replacing

EXPIRED = "batch_expired"


@dataclass
class Results:
    """What was written: ``files`` by "output" and "error", and how many lines there are of each kind."""

    files: dict[str, Body] = field(default_factory=dict)
    completed: int = 0
    failed: int = 0


def result_id(batch_id: str, kind: str) -> str:
    """The same whenever the results of a batch are written, so that a server that was killed leaves no second file."""
    return f"file-{hashlib.sha256(f'{batch_id} {kind}'.encode()).hexdigest()[:24]}"


def write_results(state: ServerState, batch_id: str, shard: Shard, expired: bool) -> Results:
    """Writes what a batch has, part by part. ``expired``: lines without a response have that error; else they are left
    out. Nobody is told of the files yet: the database names them with the end of the batch."""
    found, names = Results(), {"output": f"{batch_id}_output.jsonl", "error": f"{batch_id}_error.jsonl"}
    sizes = dict.fromkeys(names, 0)
    paths = {kind: state.path_of(result_id(batch_id, kind)) for kind in names}
    with ExitStack() as stack:
        files = {kind: stack.enter_context(replacing(path)) for kind, path in paths.items()}
        for part in shard.parts:
            for record in _records(shard, part, expired):
                bad = bool(shard.job.output.error_of(record))
                found.failed += bad
                found.completed += not bad
                sizes["error" if bad else "output"] += files["error" if bad else "output"].write(json_line(record))
    for kind, path in paths.items():
        if not sizes[kind]:
            path.unlink()
            continue
        found.files[kind] = {
            "id": path.name,
            "object": "file",
            "bytes": sizes[kind],
            "created_at": int(time.time()),
            "filename": names[kind],
            "purpose": "batch_output",
            "status": "processed",
        }
    return found


def _records(shard: Shard, part: Part, expired: bool) -> Iterator[RowRecord]:
    output = shard.job.output
    if part.number in shard.store.commits:
        yield from output.read(shard.store.folder / part.file_name(output.suffix), part.rows)
        return
    records: dict[int, Any] = dict(shard.finished.get(part.number, {}))
    if expired and len(records) < part.rows:
        ((_, table),) = read_parts(shard.job.source, [part])
        for row in shard.job.reader.rows(table, part, records.copy().__contains__):
            late = dataclasses.replace(row, extra=dataclasses.replace(row.extra, error_code=EXPIRED))
            records[row.offset] = output.failure(
                late, "the completion window of the batch ended before this request ran"
            )
    for offset in sorted(records):
        yield records[offset]
