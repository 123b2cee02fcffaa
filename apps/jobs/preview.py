"""A look at the rows of a job before its engine opens, so that the planner knows how long its sequences are and how
many there will be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from flexbatch.apps.jobs.files import SourceError
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.plan import BatchJob, make_encode
from flexbatch.apps.jobs.prompts import RowError
from flexbatch.apps.jobs.rows import RowRequest
from flexbatch.apps.jobs.sources import read_parts
from flexbatch.config import EngineConfig

if TYPE_CHECKING:
    from flexbatch.execution.job import Job

PARTS, ROWS_PER_PART = 8, 32
PLANNED_ROWS = 16_384
"""More rows than any block holds: the planner need not count further."""


@dataclass(frozen=True)
class Preview:
    """Some ``rows`` of a job that has ``num_rows`` of them; ``truncate`` is as in `JobConfig`."""

    rows: Sequence[RowRequest]
    num_rows: int
    truncate: str | None = None

    def job(self, tokenizer: Any, arch: Any) -> Job | None:
        """Returns what the planner needs to know: as many sequences as the job has, by repeating those of the rows
        seen; None where there are none."""
        from flexbatch.execution.job import Job

        pairs = self.sequences(tokenizer, arch)
        count = max(min(self.num_rows, PLANNED_ROWS), len(pairs))
        return Job.of(itertools.islice(itertools.cycle(pairs), count), arch.context) if pairs else None

    def sequences(self, tokenizer: Any, arch: Any) -> list[tuple[int, int]]:
        """Returns (prompt tokens, most new tokens) of the sequences of the rows seen."""
        encode = make_encode(SimpleNamespace(tokenizer=tokenizer, arch=arch), self.truncate)
        pairs = []
        for seen in self.rows:
            try:
                rows = [encode(request) for request in seen.requests]
            except RowError:
                continue
            for row in rows:
                prompt = len(row.token_ids)
                pairs += [(prompt, row.params.tokens_within(arch.context - prompt))] * row.params.n
        return pairs


def preview(job: BatchJob, parts: Sequence[Part]) -> Preview:
    """Returns the first rows of up to eight parts that are spread evenly over the job. What cannot be read is left
    to the job to report."""
    chosen = [parts[index * len(parts) // PARTS] for index in range(PARTS)] if len(parts) > PARTS else list(parts)
    rows: list[RowRequest] = []
    try:
        for part, table in read_parts(job.source, chosen):
            rows += [
                row
                for row in job.reader.rows(table.slice(0, ROWS_PER_PART), part, lambda offset: False)
                if not row.error
            ]
    except SourceError:
        pass
    return Preview(rows, sum(part.rows for part in parts), job.config.truncate)


def planner_job(config: EngineConfig, seen: Preview) -> Job | None:
    """Returns the planner's `Job` for the rows of a preview; None where there are none, or where random weights come
    without a tokenizer. Raises CheckpointError."""
    from flexbatch.models.opened import open_configured

    if config.dummy_weights:
        return None
    model = open_configured(config)
    return seen.job(model.tokenizer, model.arch)
