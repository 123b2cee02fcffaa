"""Runs one shard of a job in this process, and says how it ended."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flexbatch.apps.jobs.commits import Commit
from flexbatch.apps.jobs.files import SourceError
from flexbatch.apps.jobs.grants import TakenOver
from flexbatch.apps.jobs.layout import Part, shard_parts
from flexbatch.apps.jobs.pipeline import OutputError, Pipeline, TooManyErrors
from flexbatch.apps.jobs.plan import BatchJob, make_encode
from flexbatch.apps.jobs.preview import Preview, preview
from flexbatch.apps.jobs.progress import Counts, JobProgress
from flexbatch.apps.jobs.reasons import described_errors
from flexbatch.apps.jobs.results import RowRecord
from flexbatch.apps.jobs.shard_assignment import ShardAssignment
from flexbatch.apps.jobs.store import OutputStore
from flexbatch.cli.command import exit_code
from flexbatch.cli.interrupt import Interrupts, drained
from flexbatch.cli.progress import JobMeter
from flexbatch.config import EngineConfig
from flexbatch.validation.errors import CRASH, DONE, INTERRUPTED, ROW_ERRORS, ConfigurationError, DoesNotFitError, told

logger = logging.getLogger("flexbatch")

OpenEngine = Callable[[EngineConfig, Preview | None], Any]
"""Makes an `LLM`, or what serves as one: a context manager with ``stream``, ``drain``, ``tokenizer`` and ``arch``, and
with ``watch`` where its passes can be followed. The preview of the job helps it to plan."""


@dataclass
class Shard:
    """The state of one shard: what is left, and what earlier runs finished."""

    job: BatchJob
    parts: Sequence[Part]
    store: OutputStore
    left: list[Part]
    finished: dict[int, dict[int, RowRecord]]

    @classmethod
    def open(cls, job: BatchJob, assignment: ShardAssignment) -> Shard:
        """Opens a shard: compares the manifest and recovers the journal. Raises ConfigurationError."""
        parts = shard_parts(job.parts, assignment.shard, assignment.shards)
        store = OutputStore(
            job.folder, job.fingerprint, (assignment.shard, assignment.shards), overwrite=job.config.overwrite
        )
        try:
            left, finished = store.recover(parts, job.output, job.config.retry_failed, job.config.retry_truncated)
        except (ConfigurationError, ValueError, OSError):
            store.close()
            raise
        return cls(job, parts, store, left, finished)

    def errors(self) -> Iterator[str]:
        """Yields the errors of the rows that failed, those of earlier runs included, as the output has them."""
        output, failed = self.job.output, {number for number, commit in self.store.commits.items() if commit.errors}
        for part in self.parts:
            if part.number in failed:
                with contextlib.suppress(ValueError):  # a part that somebody took away is not counted
                    yield from output.errors(self.store.folder / part.file_name(output.suffix))

    def counts(self) -> Counts:
        """Returns where the shard stands before it goes on."""
        output = self.job.output
        numbers = {part.number for part in self.left}
        commits = [commit for commit in self.store.commits.values() if commit.part not in numbers]
        journaled = [Commit.of(part.number, self.finished.get(part.number, {}).values(), output) for part in self.left]
        return Counts(
            rows_total=sum(part.rows for part in self.parts),
            rows_done=sum(commit.rows for commit in commits + journaled),
            row_errors=sum(commit.errors for commit in commits + journaled),
            parts_committed=len(commits),
        )


def run_shard(job: BatchJob, assignment: ShardAssignment, open_engine: OpenEngine, resume: str) -> int:
    """Runs one shard of a job; returns the exit code. ``resume`` is the command line that goes on where this one stops.

    Raises ConfigurationError before it begins; after that, what stops it is logged together with the resume command.
    """
    shard = Shard.open(job, assignment)
    try:
        counts = shard.counts()
        if counts.rows_done and shard.left:
            logger.info(
                "resuming: %s of %s rows are done, %s parts are left",
                f"{counts.rows_done:,}",
                f"{counts.rows_total:,}",
                len(shard.left),
            )
        if not shard.left:
            return ended(shard, counts, "nothing left to do", resume)
        interrupts = Interrupts()
        seen = preview(job, shard.left)
        with interrupts.installed(), open_engine(job.engine, seen) as llm:
            job.output.start(shard.store.created, llm.tokenizer)
            meter = meter_of(llm, seen, counts.rows_total - counts.rows_done)
            return _generate(shard, counts, llm, interrupts, resume, assignment, meter)
    except ConfigurationError:
        raise
    except Exception as error:
        return stopped(error, resume)
    finally:
        close_shard(shard, assignment)


def meter_of(llm: Any, seen: Preview, rows: int) -> JobMeter:
    """What tells how far the engine is with the ``rows`` that are left: they are expected to be like those seen."""
    lengths = seen.sequences(llm.tokenizer, llm.arch) if hasattr(llm, "watch") else []
    meter = JobMeter(round(rows * len(lengths) / max(1, len(seen.rows))) if lengths else rows, lengths)
    meter.watch(llm)
    return meter


def _generate(
    shard: Shard,
    counts: Counts,
    llm: Any,
    interrupts: Interrupts,
    resume: str,
    assignment: ShardAssignment,
    meter: JobMeter,
) -> int:
    job = shard.job
    progress = JobProgress(
        counts,
        meter,
        metrics_file=job.config.metrics_file,
        labels={"shard": f"{assignment.shard}/{assignment.shards}"} if assignment.shards > 1 else {},
    )
    encode = make_encode(llm, job.config.truncate, job.config.retry_truncated)
    limit = job.config.error_limit(counts.rows_total)
    pipeline = Pipeline(job, shard.left, shard.finished, shard.store, encode, counts, interrupts, limit)
    interrupts.on_drain = lambda: drained(llm, meter, resume)
    try:
        pipeline.run(llm)
    finally:
        interrupts.on_drain = None
        progress.close()
    return ended(shard, counts, progress.ending(), resume)


def ended(shard: Shard, counts: Counts, summary: str, resume: str) -> int:
    logger.info("%s", summary)
    if counts.parts_committed < len(shard.parts):
        logger.error(
            "interrupted: %s of %s rows are done and kept; resume with: %s",
            f"{counts.rows_done:,}",
            f"{counts.rows_total:,}",
            resume,
        )
        return INTERRUPTED
    if counts.row_errors:
        logger.warning("%s", described_errors(shard.errors(), counts.rows_total))
        return ROW_ERRORS
    return DONE


def stopped(error: Exception, resume: str) -> int:
    """Says why the job stopped and how it goes on; returns the exit code. Only a failure that nobody expected comes
    with a traceback."""
    code = exit_code(error)
    if isinstance(error, OutputError):
        logger.error(
            "the output cannot be written: %s. Committed parts and finished rows are kept: free space, or repair it, "
            "and resume",
            told(error),
        )
    elif isinstance(error, (SourceError, TakenOver, TooManyErrors)) or code != CRASH:
        logger.error("%s", told(error))
    else:
        logger.error("the job failed: %s", told(error), exc_info=error)
    logger.error(
        "%s: %s",
        "after one of the remedies, resume with" if isinstance(error, DoesNotFitError) else "resume with",
        resume,
    )
    return code


def close_shard(shard: Shard, assignment: ShardAssignment) -> None:
    """Closes the store. A disk that is full must not hide why the job stopped.

    Journals of others are removed only where the whole job is committed: before, an actor that nobody could stop may
    still write to the one that it has, and what it finishes is kept for who resumes the job."""
    try:
        if assignment.shards == 1 and all(part.number in shard.store.commits for part in shard.parts):
            shard.store.sweep()
        shard.store.close()
    except OSError as error:
        logger.error("output %s: %s", shard.store.folder, told(error))
