"""Batches that run: each is a job of `flexbatch batch` with a journal, whose lines go into the block that all share."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexbatch.apps.jobs.files import SourceError
from flexbatch.apps.jobs.grants import TakenOver
from flexbatch.apps.jobs.pipeline import Pipeline
from flexbatch.apps.jobs.plan import BatchJob, make_encode, plan_job
from flexbatch.apps.jobs.progress import Counts
from flexbatch.apps.jobs.runner import Shard, close_shard
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.apps.jobs.shard_assignment import ShardAssignment
from flexbatch.apps.serve.feed import BatchFeed, BatchStopped
from flexbatch.apps.serve.results import write_results
from flexbatch.apps.serve.serving import Serving
from flexbatch.apps.serve.state import Body, ServerState
from flexbatch.cli.interrupt import Interrupts
from flexbatch.config import EngineConfig
from flexbatch.validation.errors import ConfigurationError

logger = logging.getLogger("flexbatch")

CANCELLED, EXPIRED, STOPPED = "cancelled", "expired", "stopped"
"""Why a batch does not go on. One that the server has stopped goes on with the next server."""


@dataclass(frozen=True)
class Served:
    """What batches run on: the engine, its settings, what its answers depend on, the names of its models, and the bytes
    that a line, which is a request, may have."""

    serving: Serving
    engine: EngineConfig
    identity: dict[str, Any]
    models: tuple[str, ...]
    max_request_bytes: int


class BatchRun:
    """One batch from its input to its results, in a thread of its own. ``on_end`` is called at the end, with whether it
    has to be run again: after what may pass, such as a full disk."""

    def __init__(
        self, state: ServerState, served: Served, body: Body, on_end: Callable[[BatchRun, bool], None]
    ) -> None:
        self.id, self.endpoint = body["id"], body["endpoint"]
        self._state, self._served, self._on_end = state, served, on_end
        self._feed = BatchFeed(served.serving)
        self._why = CANCELLED if body["status"] == "cancelling" else ""
        self.counts = Counts(body["request_counts"]["total"])
        self._started: tuple[float, int] | None = None
        """When the lines of this run began to end, and how many had ended before."""
        self._thread = threading.Thread(target=self._run, name=self.id, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, why: str) -> None:
        """Let the batch end; what was finished is kept. The first reason counts."""
        self._why = self._why or why
        self._feed.stop()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def seconds_left(self) -> float | None:
        """At the rate of this run so far; None while nothing is known."""
        if self._started is None or self.counts.rows_done <= self._started[1]:
            return None
        since, before = self._started
        rate = (self.counts.rows_done - before) / max(1e-3, time.monotonic() - since)
        return (self.counts.rows_total - self.counts.rows_done) / rate

    def _run(self) -> None:
        again, job = False, None
        try:
            job = self._plan()
            whole = not self._why and self._generate(job)
            # From here on nothing changes why it ends, whoever stops it: a server that stops while results are written
            # may not take a batch that has them all for one that goes on.
            why = "" if whole else self._why
            if why != STOPPED:
                self._finish(job, why)
        except (ConfigurationError, SourceError, OSError, TakenOver) as error:
            again = may_pass(error, planned=job is not None)
            if again:
                logger.error("%s waits, as its files cannot be read or written: %s", self.id, error)
            else:
                logger.warning("%s failed: %s", self.id, error)
                self._fail("invalid_input", "the input file cannot be read as a batch file")
        except Exception:
            logger.exception("%s failed", self.id)
            self._fail("server_error", "the server failed while it ran the batch; its log says why")
        finally:
            self._on_end(self, again)

    def _plan(self) -> BatchJob:
        """Raises ConfigurationError for an input that holds no requests."""
        folder = self._state.folder_of(self.id)
        config, served = JobConfig(input_format="openai"), self._served
        job = plan_job(
            str(folder / "input.jsonl"),
            str(folder / "out"),
            config,
            served.engine,
            lambda engine: served.identity,
            served.models,
            (self.endpoint,),
            served.max_request_bytes,
        )
        if not sum(part.rows for part in job.parts):
            raise ConfigurationError("the input file holds no requests")
        return job

    def _generate(self, job: BatchJob) -> bool:
        """Whether every line has its response now."""
        llm, shard = self._served.serving.llm, Shard.open(job, ShardAssignment())
        try:
            self.counts = counts = shard.counts()

            def begin(body: Body) -> None:
                if body["status"] == "validating":
                    began(body, "in_progress")
                count(body, counts)

            self._state.change_batch(self.id, begin)
            self._started = time.monotonic(), counts.rows_done
            job.output.start(shard.store.created, llm.tokenizer)
            encode = make_encode(llm, None)
            with contextlib.suppress(BatchStopped):
                Pipeline(job, shard.left, shard.finished, shard.store, encode, counts, Interrupts()).run(self._feed)
            self._state.change_batch(self.id, lambda body: count(body, counts))
            whole = counts.parts_committed == len(shard.parts)
            if whole:
                self._state.change_batch(self.id, finalizing)
            return whole
        finally:
            close_shard(shard, ShardAssignment())

    def _finish(self, job: BatchJob, why: str) -> None:
        """Write the results, and end the batch and name them in one step. Killed before, it is done again."""
        shard = Shard.open(job, ShardAssignment())
        try:
            results = write_results(self._state, self.id, shard, why == EXPIRED)
        finally:
            close_shard(shard, ShardAssignment())

        def end(body: Body) -> None:
            # Whoever was told that it is being cancelled sees it cancelled, though every line has its response.
            began(body, why or (CANCELLED if body["status"] == "cancelling" else "completed"))
            total = sum(part.rows for part in job.parts)
            body["request_counts"] = {"total": total, "completed": results.completed, "failed": results.failed}
            for kind, file in results.files.items():
                body[f"{kind}_file_id"] = file["id"]

        body = self._state.change_batch(self.id, end, tuple(results.files.values()))
        self._state.remove_batch_folder(self.id)
        logger.info("%s %s: %s responses, %s errors", self.id, body["status"], results.completed, results.failed)

    def _fail(self, code: str, message: str) -> None:
        def end(body: Body) -> None:
            began(body, "failed")
            body["errors"] = {
                "object": "list",
                "data": [{"code": code, "message": message, "line": None, "param": None}],
            }

        self._state.change_batch(self.id, end)
        self._state.remove_batch_folder(self.id)


def may_pass(error: Exception, planned: bool) -> bool:
    """Whether a batch that was stopped is to be run again: one that has failed loses what it had finished. What the
    system refuses, such as room on the disk, may pass. Once its input is read (``planned``), so may what its output
    folder cannot be used for: the input has no part in that."""
    refused = isinstance(error, (OSError, TakenOver)) or isinstance(error.__cause__, OSError)
    return refused or (planned and isinstance(error, ConfigurationError))


def began(body: Body, status: str) -> None:
    """Note a status, and since when."""
    body["status"], body[f"{status}_at"] = status, int(time.time())


def finalizing(body: Body) -> None:
    """Its results are written now. One that is being cancelled stays that."""
    if body["status"] != "cancelling":
        began(body, "finalizing")


def count(body: Body, counts: Counts) -> None:
    good = counts.rows_done - counts.row_errors
    body["request_counts"] = {"total": counts.rows_total, "completed": good, "failed": counts.row_errors}
