"""Runs one shard of a job in this process, and says how it ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flexbatch.apps.jobs.files import SourceError
from flexbatch.apps.jobs.grants import TakenOver
from flexbatch.apps.jobs.interrupt import INTERRUPTED, Interrupts
from flexbatch.apps.jobs.layout import Part, shard_parts
from flexbatch.apps.jobs.openai import OpenAIOutput
from flexbatch.apps.jobs.pipeline import OutputError, Pipeline, TooManyErrors
from flexbatch.apps.jobs.plan import Job, make_encode
from flexbatch.apps.jobs.preview import Preview, preview
from flexbatch.apps.jobs.progress import Counts, Progress
from flexbatch.apps.jobs.results import Record
from flexbatch.apps.jobs.shares import Share
from flexbatch.apps.jobs.store import OutputStore
from flexbatch.apps.jobs.token_texts import TokenTexts
from flexbatch.config import EngineConfig
from flexbatch.validation.errors import ConfigurationError, DoesNotFitError

logger = logging.getLogger("flexbatch")
DONE, CRASH, ROW_ERRORS = 0, 1, 3

OpenEngine = Callable[[EngineConfig, Preview | None], Any]
"""Makes an `LLM`, or what serves as one: a context manager with ``stream``, ``tokenizer`` and ``arch``. What was
seen of the job helps it to plan."""


@dataclass
class Shard:
    """The state of one shard: what is left, and what earlier runs finished."""

    job: Job
    parts: Sequence[Part]
    store: OutputStore
    left: list[Part]
    finished: dict[int, dict[int, Record]]

    @classmethod
    def open(cls, job: Job, share: Share) -> Shard:
        """Compares the manifest and recovers the journal. Raises ConfigurationError."""
        parts = shard_parts(job.parts, share.shard, share.shards)
        store = OutputStore(job.folder, job.fingerprint, (share.shard, share.shards), overwrite=job.config.overwrite)
        try:
            left, finished = store.recover(parts, job.output, job.config.retry_failed)
        except (ConfigurationError, ValueError, OSError):
            store.close()
            raise
        if isinstance(job.output, OpenAIOutput):
            job.output.created = store.created
        return cls(job, parts, store, left, finished)

    def counts(self) -> Counts:
        """Where the shard stands before it goes on."""
        output = self.job.output
        numbers = {part.number for part in self.left}
        commits = [commit for commit in self.store.commits.values() if commit.part not in numbers]
        journaled = [record for part in self.left for record in self.finished.get(part.number, {}).values()]
        return Counts(
            rows_total=sum(part.rows for part in self.parts),
            rows_done=sum(commit.rows for commit in commits) + len(journaled),
            row_errors=sum(commit.errors for commit in commits)
            + sum(bool(output.error_of(record)) for record in journaled),
            parts_committed=len(commits),
        )


def run_shard(job: Job, share: Share, open_engine: OpenEngine, resume: str) -> int:
    """Does the shard's share of a job; returns the exit code. ``resume`` is the command line that goes on where this
    one stops.

    Raises ConfigurationError before it begins; after that, what stops it is logged together with the resume command.
    """
    shard = Shard.open(job, share)
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
        with interrupts.installed(), open_engine(job.engine, preview(job, shard.left)) as llm:
            if isinstance(job.output, OpenAIOutput):
                job.output.texts = TokenTexts(llm.tokenizer)
            return _generate(shard, counts, llm, interrupts, resume, share)
    except ConfigurationError:
        raise
    except Exception as error:
        return stopped(error, resume)
    finally:
        close_shard(shard, share)


def _generate(shard: Shard, counts: Counts, llm: Any, interrupts: Interrupts, resume: str, share: Share) -> int:
    job = shard.job
    progress = Progress(
        counts,
        metrics_file=job.config.metrics_file,
        labels={"shard": f"{share.shard}/{share.shards}"} if share.shards > 1 else {},
    )
    pipeline = Pipeline(
        job.source, shard.left, shard.finished, job.output, shard.store, make_encode(llm, job.config.truncate), counts, interrupts,
        window_rows=job.config.window_rows, max_errors=job.config.error_limit(counts.rows_total),
    )  # fmt: skip

    def draining() -> None:
        progress.say(
            f"flexbatch: finishing what has begun ({pipeline.describe_open()}); Ctrl-C again stops now, and costs "
            "the tokens of the sequences in flight"
        )

    interrupts.on_drain = draining
    try:
        pipeline.run(llm)
    finally:
        interrupts.on_drain = None
        progress.close()
    return ended(shard, counts, progress.line(), resume)


def ended(shard: Shard, counts: Counts, summary: str, resume: str) -> int:
    logger.info("%s", summary)
    if counts.parts_committed < len(shard.parts):
        logger.error(
            "interrupted after %s of %s parts; resume with: %s", counts.parts_committed, len(shard.parts), resume
        )
        return INTERRUPTED
    if counts.row_errors:
        logger.warning(
            "%s of %s rows have an error, see the column error; run them again with --retry-failed",
            f"{counts.row_errors:,}",
            f"{counts.rows_total:,}",
        )
        return ROW_ERRORS
    return DONE


def stopped(error: Exception, resume: str) -> int:
    """Says why the job stopped and how it goes on; returns the exit code. Only a failure that nobody expected comes
    with a traceback."""
    from flexbatch.cli.settings import exit_code

    code = exit_code(error)
    if isinstance(error, OutputError):
        logger.error(
            "the output cannot be written: %s. Committed parts and finished rows are kept: make room, or mend it, "
            "and resume",
            error,
        )
    elif isinstance(error, (SourceError, TakenOver, TooManyErrors)) or code != CRASH:
        logger.error("%s", error)
    else:
        logger.error("the job failed: %s", error, exc_info=error)
    logger.error(
        "%s: %s",
        "after one of the remedies, resume with" if isinstance(error, DoesNotFitError) else "resume with",
        resume,
    )
    return code


def close_shard(shard: Shard, share: Share) -> None:
    """A disk that is full must not hide why the job stopped."""
    try:
        if share.shards == 1:
            shard.store.sweep()
        shard.store.close()
    except OSError as error:
        logger.error("output %s: %s", shard.store.folder, error)
