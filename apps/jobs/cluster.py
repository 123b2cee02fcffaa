"""One job on a Ray cluster: the driver keeps the manifest and the list of parts, actors with an engine each do and
commit them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import uuid
from collections.abc import Iterator
from typing import Any

from flexbatch.apps.jobs.commits import Commit
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.part_queue import PartQueue
from flexbatch.apps.jobs.pipeline import Pipeline, TooManyErrors
from flexbatch.apps.jobs.plan import BatchJob, make_encode
from flexbatch.apps.jobs.preview import preview
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


class Worker:
    """One engine on the cluster; a Ray actor that commits parts itself."""

    def __init__(self, number: int, open_engine: OpenEngine) -> None:
        self._number, self._open_engine = number, open_engine

    def run(self, part_queue: Any) -> list[dict[str, int]]:
        """Processes parts until there are none left, or the queue is stopped and the sequences in flight have ended;
        returns what is finished of the parts that are not. Called again after a restart, it first gives back what its
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

            encode, interrupts = make_encode(llm, job.config.truncate, job.config.retry_truncated), Interrupts()
            pipeline = Pipeline(job, parts(), finished, store, encode, Counts(0), interrupts, on_commit=committed)
            with until_stopped(part_queue, interrupts, llm):
                pipeline.run(llm)
            return [dataclasses.asdict(commit) for commit in pipeline.unfinished]


@contextlib.contextmanager
def until_stopped(part_queue: Any, interrupts: Interrupts, llm: Any) -> Iterator[None]:
    """In the body no more sequences begin once the queue is stopped. A worker gets no signals and is busy until its
    last part: it has to ask."""
    import ray

    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(POLL_S):
            if ray.get(part_queue.stopped.remote()):
                interrupts.draining.set()
                llm.drain()
                return

    asking = threading.Thread(target=ask, name="until stopped", daemon=True)
    asking.start()
    try:
        yield
    finally:
        ended.set()
        asking.join()


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
            "interrupted: the actors finish the sequences that they have in flight, no others begin (Ctrl-C again "
            f"stops now, and costs their tokens); what is done is kept; go on with: {resume}"
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
                for unfinished in ray.get(done):
                    for commit in unfinished:
                        _add(counts, Commit(**commit), journaled.pop(commit["part"], {}), shard)
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
    """Adds a committed part."""
    shard.store.commits[commit.part] = commit
    counts.parts_committed += 1
    _add(counts, commit, before, shard)


def _add(counts: Counts, commit: Commit, before: dict[int, RowRecord], shard: Shard) -> None:
    """Adds what is finished of a part, minus what was counted of it when the job began."""
    old = Commit.of(commit.part, before.values(), shard.job.output)
    counts.add(
        commit.rows - old.rows,
        commit.errors - old.errors,
        commit.input_tokens - old.input_tokens,
        commit.generated_tokens - old.generated_tokens,
    )
