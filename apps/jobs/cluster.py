"""One job on a Ray cluster: the driver keeps the manifest and the list of parts, actors with an engine each do and
commit them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexbatch.apps.jobs.commits import Commit, identity, read_commits
from flexbatch.apps.jobs.journal import Journal
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.manifest import STATE
from flexbatch.apps.jobs.pipeline import Pipeline, TooManyErrors
from flexbatch.apps.jobs.plan import BatchJob, make_encode
from flexbatch.apps.jobs.preview import Preview, preview
from flexbatch.apps.jobs.progress import Counts, JobProgress
from flexbatch.apps.jobs.results import RowRecord
from flexbatch.apps.jobs.runner import OpenEngine, Shard, close_shard, ended, stopped
from flexbatch.apps.jobs.shard_assignment import ShardAssignment
from flexbatch.apps.jobs.store import OutputStore
from flexbatch.cli.interrupt import Interrupts
from flexbatch.validation.errors import ConfigurationError

logger = logging.getLogger("flexbatch")
RESTARTS = 3
"""How often an actor that dies is started again: a part that kills every actor must not run forever."""
POLL_S = 0.5


class PartQueue:
    """Hands out the parts of a job to workers, one at a time and in order. It is a Ray actor, so that all workers see
    the same list.

    ``parts``: number -> records of rows that are finished; ``seen`` is for the workers' planners, ``grant`` is the
    driver's, in whose name they write. What a worker held when it died goes to the front again, with what its journal
    holds. Every hand-out has a number of its own, so that what a worker still records that was only thought dead counts
    as older than what its successor does.
    """

    def __init__(
        self,
        job: BatchJob,
        digest: bytes,
        parts: dict[int, dict[int, RowRecord]],
        seen: Preview | None = None,
        grant: Path | None = None,
    ) -> None:
        self._job, self._digest, self._finished, self._seen, self._grant = job, digest, parts, seen, grant
        self._leases = 0
        self._waiting = deque(parts)
        self._held: dict[int, set[int]] = {}
        self._commits: list[dict[str, int]] = []
        self._done: set[int] = set()
        self._stopped = False

    def job(self) -> tuple[BatchJob, Preview | None, Path | None]:
        """Returns what the workers need. A restarted actor cannot count on large arguments of its own, which Ray may
        have lost with their node."""
        return self._job, self._seen, self._grant

    def register(self, worker: int) -> None:
        """Registers a worker that begins, perhaps again."""
        lost = self._held.pop(worker, set())
        self._held[worker] = set()
        if not lost:
            return
        job, config = self._job, self._job.config
        retry = config.retry_failed or config.retry_truncated is not None
        state = Path(job.folder).expanduser() / STATE
        if not retry:
            known = read_commits(state, self._digest)
            for number in sorted(lost):
                found = identity(state.parent / job.parts[number].file_name(job.output.suffix))
                if found is not None and (commit := known.get(number, {}).get(found)) is not None:
                    self._add(dataclasses.asdict(commit))
                    lost.discard(number)
        for number, records in Journal(state, "part-queue", self._digest).recover(lost.__contains__).items():
            self._finished[number] = {
                **self._finished[number],
                **{row: record for row, record in records.items() if not job.runs_again(record)},
            }
        self._waiting.extendleft(sorted(lost, reverse=True))

    def take(self, worker: int) -> tuple[int, dict[int, RowRecord], int] | None:
        """Returns the next part, its finished rows and the number of this hand-out; None when there is none, or no
        more are wanted."""
        if self._stopped or not self._waiting:
            return None
        part = self._waiting.popleft()
        self._held[worker].add(part)
        self._leases += 1
        return part, self._finished[part], self._leases

    def done(self, worker: int, commit: dict[str, int]) -> None:
        self._held[worker].discard(commit["part"])
        self._add(commit)

    def _add(self, commit: dict[str, int]) -> None:
        """Adds a commit once: a worker that was only thought dead may report a part twice."""
        if commit["part"] not in self._done:
            self._done.add(commit["part"])
            self._commits.append(commit)

    def stop(self) -> None:
        """Hands out no more parts: workers finish what they have."""
        self._stopped = True

    def take_commits(self) -> list[dict[str, int]]:
        """Returns what was committed since the last call."""
        commits, self._commits = self._commits, []
        return commits


class Worker:
    """One engine on the cluster; a Ray actor that commits parts itself."""

    def __init__(self, number: int, open_engine: OpenEngine) -> None:
        self._number, self._open_engine = number, open_engine

    def run(self, part_queue: Any) -> None:
        """Processes parts until there are none left. Called again after a restart, it first gives back what its
        predecessor held."""
        import ray

        number = self._number
        ray.get(part_queue.register.remote(number))
        job, seen, grant = ray.get(part_queue.job.remote())
        finished: dict[int, dict[int, RowRecord]] = {}

        def parts() -> Iterator[Part]:
            while (task := ray.get(part_queue.take.remote(number))) is not None:
                finished[task[0]] = task[1]
                store.begin(job.parts[task[0]], job.output, task[2])
                yield job.parts[task[0]]

        with contextlib.ExitStack() as stack:
            name = f"worker-{number}-{uuid.uuid4().hex}"
            store = OutputStore(job.folder, job.fingerprint, worker=name, grant=grant)
            stack.callback(store.close)
            llm = stack.enter_context(self._open_engine(job.engine, seen))
            job.output.start(store.created, llm.tokenizer)

            def committed(part: Part) -> None:
                ray.get(part_queue.done.remote(number, dataclasses.asdict(store.commits[part.number])))

            encode = make_encode(llm, job.config.truncate, job.config.retry_truncated)
            Pipeline(job, parts(), finished, store, encode, Counts(0), Interrupts(), on_commit=committed).run(llm)


def check_cluster(resources: dict[str, float], actors: int, cpus: float, gpus: float) -> None:
    """Raises ConfigurationError where Ray would wait forever for resources that the cluster does not have."""
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        if resources.get(name, 0) < actors * each:
            raise ConfigurationError(
                f"{actors} Ray actors with {each:g} {name} each need {actors * each:g}, the cluster has "
                f"{resources.get(name, 0):g}: Ray would wait for ever. "
                f"Lower --ray-actors{' or --ray-cpus' if name == 'CPU' else ''}, or join a larger cluster with "
                "--ray-address"
            )


def run_on_ray(job: BatchJob, open_engine: OpenEngine, resume: str) -> int:
    """Runs a job on a Ray cluster: the same parts, manifest and exit codes as `run_shard`. The output folder must be
    shared by all nodes.

    Parts are committed by the actors themselves, because Ray Data checkpoints hardly anything after a failure. An
    actor that dies is started again and goes on from its journal, three times.
    """
    try:
        import ray
    except ImportError:
        raise ConfigurationError("--ray needs Ray: pip install 'flexbatch[ray]'") from None
    shard = Shard.open(job, ShardAssignment())
    try:
        counts = shard.counts()
        if not shard.left:
            return ended(shard, counts, "nothing left to do", resume)
        started_here = not ray.is_initialized()
        if started_here:
            ray.init(address=job.config.ray_address, log_to_driver=False, configure_logging=False)
        try:
            return _drive(shard, counts, open_engine, resume)
        finally:
            if started_here:
                ray.shutdown()
    except ConfigurationError:
        raise
    except ray.exceptions.RayTaskError as error:
        return stopped(error.cause if isinstance(error.cause, Exception) else error, resume)
    except Exception as error:
        return stopped(error, resume)
    finally:
        close_shard(shard, ShardAssignment())


def _drive(shard: Shard, counts: Counts, open_engine: OpenEngine, resume: str) -> int:
    """Starts the actors and counts what they commit."""
    import ray

    waiting = {part.number: shard.finished.get(part.number, {}) for part in shard.left}
    part_queue, workers = _start_actors(shard, waiting, open_engine)
    config = shard.job.config
    interrupts, progress = Interrupts(), JobProgress(counts, metrics_file=config.metrics_file)
    limit = config.error_limit(counts.rows_total)

    def draining() -> str:
        part_queue.stop.remote()
        return (
            "interrupted: the actors finish the parts that they have (Ctrl-C again stops now, and costs the tokens of "
            f"the sequences in flight); what is done is kept; go on with: {resume}"
        )

    interrupts.on_drain = draining
    # Rows of an unfinished part are counted when it is committed.
    journaled = {number: finished for number, finished in waiting.items() if finished}
    try:
        with interrupts.installed():
            pending = [worker.run.remote(part_queue) for worker in workers]
            while pending:
                done, pending = ray.wait(pending, timeout=POLL_S)
                for commit in ray.get(part_queue.take_commits.remote()):
                    _count(counts, Commit(**commit), journaled.pop(commit["part"], {}), shard)
                if limit is not None and counts.row_errors > limit:
                    raise TooManyErrors(
                        f"{counts.row_errors} rows failed, more than the {limit} that --max-errors allows"
                    )
                ray.get(done)
    finally:
        progress.close()
    return ended(shard, counts, progress.ending(), resume)


def _start_actors(
    shard: Shard, waiting: dict[int, dict[int, RowRecord]], open_engine: OpenEngine
) -> tuple[Any, list[Any]]:
    """Returns the actors of the part queue and of the workers. Raises ConfigurationError."""
    import ray

    job, config = shard.job, shard.job.config
    resources = ray.cluster_resources()
    gpus = 0.0 if job.engine.device == "cpu" or not resources.get("GPU") else 1.0
    actors = min(config.ray_actors or int(resources.get("GPU", 0) if gpus else 1), len(shard.left))
    check_cluster(resources, actors, config.ray_cpus, gpus)
    if ray.available_resources().get("CPU", 0) < actors * config.ray_cpus:
        logger.warning("other jobs hold CPUs of the Ray cluster: actors that find none wait until they are free")
    # Small sort buffers keep one actor from taking most parts of a small job.
    rows = sum(part.rows for part in shard.left)
    buffer_rows = max(1, min(config.window_rows, rows // (8 * actors)))
    job = dataclasses.replace(job, config=dataclasses.replace(config, window_rows=buffer_rows))
    assert shard.store.grant is not None
    part_queue: Any = ray.remote(num_cpus=0)(PartQueue).remote(
        job, shard.store.digest, waiting, preview(job, shard.left), shard.store.grant.path
    )
    worker: Any = ray.remote(num_cpus=config.ray_cpus, num_gpus=gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS)(
        Worker
    )
    return part_queue, [worker.remote(number, open_engine) for number in range(actors)]


def _count(counts: Counts, commit: Commit, before: dict[int, RowRecord], shard: Shard) -> None:
    """Adds a committed part, minus what was counted of it when the job began."""
    shard.store.commits[commit.part] = commit
    counts.parts_committed += 1
    old = Commit.of(commit.part, before.values(), shard.job.output)
    counts.add(
        commit.rows - old.rows,
        commit.errors - old.errors,
        commit.input_tokens - old.input_tokens,
        commit.generated_tokens - old.generated_tokens,
    )
