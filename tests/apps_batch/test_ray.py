from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pytest

from flexbatch.apps.jobs.cluster import Worker, check_cluster, run_on_ray
from flexbatch.apps.jobs.part_queue import PartQueue
from flexbatch.apps.jobs.plan import BatchJob, plan_job
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.apps.jobs.store import OutputStore
from flexbatch.apps.ray import GenerateText
from flexbatch.config import EngineConfig
from flexbatch.validation.errors import DONE, INTERRUPTED, ConfigurationError
from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.helpers import (
    RESULTS,
    benchmark_prompts,
    parts_of,
    read_output,
    run_here,
    start,
    wait_for,
    write_input,
)
from tests.apps_batch.invariants import check_store


def generate_text(**settings: object) -> GenerateText:
    return GenerateText(open_engine=lambda config, seen: FakeLLM(block=4), **settings)


def test_batches_get_the_columns_of_a_job() -> None:
    table = pa.table({"text": ["a", None, "b" * 600, "c"], "n": [1, 2, 3, 4]})
    out = generate_text(prompt_column="text", max_tokens=9)(table)
    assert out.select(["text", "n"]).equals(table) and tuple(out.schema.names[2:]) == RESULTS
    assert [bool(error) for error in out["error"].to_pylist()] == [False, True, True, False]
    assert generate_text(prompt_column="text")(table.slice(0, 0)).schema.names == ["text", "n", *RESULTS]


def test_the_engine_is_refilled_across_the_borders_of_batches() -> None:
    batches = [pa.record_batch({"prompt": [f"{i}-{j}" for j in range(3)]}) for i in range(5)]
    drawn: list[int] = []

    def source():  # type: ignore[no-untyped-def]
        for position, batch in enumerate(batches):
            drawn.append(position)
            yield batch

    out = []
    for batch in generate_text(max_tokens=6).stream(source()):
        out.append(batch)
        assert len(drawn) > len(out) or len(out) == 5
    assert [batch["prompt"].to_pylist() for batch in out] == [batch["prompt"].to_pylist() for batch in batches]
    whole = generate_text(max_tokens=6)(pa.Table.from_batches(batches))
    assert pa.Table.from_batches(out).equals(whole)


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ConfigurationError, match="unknown settings: max_token"):
        generate_text(max_token=3)


def test_a_cluster_that_is_too_small_is_refused_and_not_waited_for() -> None:
    check_cluster({"CPU": 2.0}, 3, 0.5, 0)
    with pytest.raises(ConfigurationError, match="3 Ray actors with 1 CPU each need 3, the cluster has 2"):
        check_cluster({"CPU": 2.0}, 3, 1, 0)
    with pytest.raises(ConfigurationError, match="GPU"):
        check_cluster({"CPU": 9.0}, 1, 1, 1)


def planned(tmp_path: Path, **settings: object) -> BatchJob:
    source = write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(40)])
    config = JobConfig(part_rows=10, **settings)  # type: ignore[arg-type]
    return plan_job(str(source), str(tmp_path / "out"), config, EngineConfig(), lambda engine: {"weights": "fake"})


def test_parts_of_a_worker_that_died_go_out_again_with_what_it_finished(tmp_path: Path) -> None:
    job = planned(tmp_path)
    store = OutputStore(job.folder, job.fingerprint, worker="worker-0-a")
    part_queue = PartQueue(job, store.digest, {number: {} for number in range(4)})
    for worker in (0, 1):
        part_queue.register(worker)
    assert [part_queue.take(0), part_queue.take(0), part_queue.take(1)] == [(0, {}, 1), (1, {}, 2), (2, {}, 3)]
    record = ["text", "stop", 1, 2, "", None, None]
    store.journal.append(1, 5, record)
    part = job.parts[0]
    store.commit(part, next(iter_tables(job)), [record] * 10, job.output)
    part_queue.register(0)
    assert part_queue.take(1) == (1, {5: record}, 4) and part_queue.take(1) == (3, {}, 5) and part_queue.take(0) is None
    commits = part_queue.take_commits()
    assert commits == [dataclasses.asdict(store.commits[0])] and part_queue.take_commits() == []
    store.close()


def iter_tables(job: BatchJob):  # type: ignore[no-untyped-def]
    from flexbatch.apps.jobs.sources import read_parts

    return (table for _, table in read_parts(job.source, job.parts))


class Remote:
    """An actor's handle in this process: ``handle.method.remote(...)`` calls the method, one call at one time."""

    def __init__(self, actor: object) -> None:
        self._actor, self._lock = actor, threading.Lock()

    def __getattr__(self, name: str) -> SimpleNamespace:
        def call(*words: object) -> object:
            with self._lock:
                return getattr(self._actor, name)(*words)

        return SimpleNamespace(remote=call)


@pytest.mark.parametrize("retry", [False, True])
def test_a_worker_that_was_thought_dead_counts_nothing_twice(
    tmp_path: Path, retry: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is held up in the middle of its first part; another one does all of them; then it goes on."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value))
    job = planned(tmp_path, retry_failed=retry)
    driver = OutputStore(job.folder, job.fingerprint)
    if retry:
        for part, table in zip(job.parts, iter_tables(job), strict=True):
            driver.commit(part, table, [[None, "error", 0, 0, "an error", None, None]] * 10, job.output)
    left, finished = driver.recover(job.parts, job.output, retry)
    waiting = {part.number: finished.get(part.number, {}) for part in left}
    assert len(waiting) == 4 and driver.grant is not None
    part_queue = PartQueue(job, driver.digest, waiting, None, driver.grant.path)
    held, go_on = threading.Event(), threading.Event()

    class HeldUp(FakeLLM):
        def stream(self, items, on_tokens=None):  # type: ignore[no-untyped-def]
            for position, pair in enumerate(super().stream(items)):
                if position == 3:
                    held.set()
                    assert go_on.wait(60)
                yield pair

    handle = Remote(part_queue)
    first = threading.Thread(target=Worker(0, lambda config, seen: HeldUp(block=4)).run, args=(handle,))
    first.start()
    assert held.wait(60)
    Worker(0, lambda config, seen: FakeLLM(block=4)).run(handle)
    sizes = {path: path.stat().st_mtime_ns for path in parts_of(tmp_path / "out")}
    go_on.set()
    first.join(60)
    assert not first.is_alive() and len(sizes) == 4
    assert {path: path.stat().st_mtime_ns for path in parts_of(tmp_path / "out")} == sizes
    assert sorted(commit["part"] for commit in part_queue.take_commits()) == [0, 1, 2, 3]
    table = read_output(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(40)) and set(table["error"].to_pylist()) == {""}
    driver.close()
    again = OutputStore(job.folder, job.fingerprint)
    assert again.recover(job.parts, job.output)[0] == []
    check_store(again, job.parts, job.output)
    again.sweep()
    again.close()
    assert not list(tmp_path.rglob("journal-*")) and not list(tmp_path.rglob(".part-*"))


class ThreadedRay(SimpleNamespace):
    """What a driver needs of Ray, with actors in this process and a thread for every call of `Worker.run`."""

    exceptions = SimpleNamespace(RayTaskError=type("RayTaskError", (Exception,), {}))

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0}

    available_resources = cluster_resources

    def remote(self, **resources: object):  # type: ignore[no-untyped-def]
        def made(kind: type) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *words: self.handle(kind(*words)))

        return made

    def handle(self, actor: object) -> object:
        if not isinstance(actor, Worker):
            return Remote(actor)
        return SimpleNamespace(run=SimpleNamespace(remote=lambda queue: self.pool.submit(actor.run, queue)))

    def wait(self, pending: list[Future], timeout: float) -> tuple[list[Future], list[Future]]:
        self.polled()
        done, left = wait(pending, timeout / 50, FIRST_COMPLETED)
        return list(done), list(left)

    def get(self, value: object) -> object:
        if isinstance(value, list):
            return [each.result() if isinstance(each, Future) else each for each in value]
        return value


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedRay]:
    with ThreadPoolExecutor() as pool:
        ray = ThreadedRay(pool=pool, polled=lambda: None, killed=threading.Event())
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setattr("flexbatch.apps.jobs.cluster.POLL_S", 0.01)
        yield ray


class Interrupted(FakeLLM):
    """Holds up an answer until it is told to begin nothing more, or until its driver has gone."""

    def __init__(self, ray: ThreadedRay, goes_on: bool, held_up: int) -> None:
        super().__init__(block=3)
        self.drained, self.ray, self.goes_on, self.held_up = threading.Event(), ray, goes_on, held_up
        self.seen: int | None = None

    def drain(self) -> int:
        self.drained.set()
        return super().drain()

    def stream(self, items, on_tokens=None):  # type: ignore[no-untyped-def]
        for count, pair in enumerate(super().stream(items)):
            if count == self.held_up:
                self.seen = self.prompts_seen
                assert self.drained.wait(60)
                assert self.goes_on or self.ray.killed.wait(60)
            yield pair


@pytest.mark.parametrize("held_up", [3, 12, 25])
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_ends_a_ray_job(
    tmp_path: Path,
    ray_here: ThreadedRay,
    times: int,
    held_up: int,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """After the first the sequences in flight are finished, and no others begin, not even of the part that an actor
    has; the second does not wait for them. The same command goes on."""
    first, second = Interrupted(ray_here, times == 1, held_up), FakeLLM()
    engines: list[FakeLLM] = [first, second]
    given = iter(engines)
    sent: list[int] = []

    def interrupt() -> None:
        if first.seen is not None and len(sent) < times:
            sent.append(1)
            signal.raise_signal(signal.SIGINT)

    ray_here.polled = interrupt
    caplog.set_level("INFO")
    job = planned(tmp_path, ray_actors=1, max_tokens=20)
    if times == 1:
        assert run_on_ray(job, lambda engine, seen: next(given), "RESUME") == INTERRUPTED
        assert first.prompts_seen == first.seen < held_up + 7
        assert f"interrupted: {first.seen} of 40 rows are done and kept; resume with: RESUME" in caplog.text
    else:
        with pytest.raises(KeyboardInterrupt):
            run_on_ray(job, lambda engine, seen: next(given), "RESUME")
        ray_here.killed.set()
    assert "sequences that they have in flight" in (said := capfd.readouterr().err) and "RESUME" in said
    ray_here.pool.shutdown(wait=True)
    ray_here.pool = ThreadPoolExecutor()
    assert run_on_ray(job, lambda engine, seen: next(given), "RESUME") == DONE
    assert first.prompts_seen + second.prompts_seen == 40
    assert read_output(tmp_path / "out")["id"].to_pylist() == list(range(40))


def test_a_stopped_part_queue_hands_out_nothing(tmp_path: Path) -> None:
    job = planned(tmp_path)
    part_queue = PartQueue(job, b"x" * 16, {0: {}})
    part_queue.register(0)
    part_queue.stop()
    assert part_queue.take(0) is None


@pytest.mark.slow
def test_ray_data_keeps_order_with_an_actor_pool() -> None:
    pytest.importorskip("ray")
    import ray
    import ray.data

    ray.init(num_cpus=2, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        rows = ray.data.from_arrow(pa.table({"prompt": [f"p{i}" for i in range(200)]})).repartition(8)
        rows = rows.map_batches(
            GenerateText,
            fn_constructor_kwargs={"open_engine": lambda config, seen: FakeLLM(), "max_tokens": 8},
            batch_format="pyarrow",
            batch_size=25,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=0.5,
        )
        out = rows.take_all()
    finally:
        ray.shutdown()
    whole = generate_text(max_tokens=8)(pa.table({"prompt": [f"p{i}" for i in range(200)]})).to_pylist()
    assert out == whole


def test_a_ray_job_with_three_actors_survives_the_death_of_one(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    source, out = write_input(tmp_path / "in.parquet", benchmark_prompts(900)), tmp_path / "out"
    flags = ("--part-rows", 20)
    assert run_here(source, tmp_path / "whole", *flags, count_file=str(tmp_path / "once")) == 0
    process = start(
        source,
        out,
        *flags,
        "--ray",
        "--ray-actors",
        3,
        "--ray-cpus",
        0.5,
        block=8,
        step_s=0.01,
        count_file=str(tmp_path / "tokens"),
    )
    wait_for(lambda: len(parts_of(out)) >= 6, process, 120)
    actors = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "ray::Worker" in " ".join(child.cmdline())
    ]
    assert len(actors) == 3, process.communicate()
    actors[1].kill()
    printed, err = process.communicate(timeout=240)
    assert process.returncode == 0 and printed == "", err
    assert read_output(out).equals(read_output(tmp_path / "whole"))
    assert (tmp_path / "tokens").stat().st_size < 1.15 * (tmp_path / "once").stat().st_size
    assert not list((out / ".flexbatch").glob("journal-*"))
    assert run_here(source, out, *flags) == 0


@pytest.mark.slow
def test_a_ray_job_that_is_killed_is_resumed_by_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    source, out = write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(300)]), tmp_path / "out"
    process = start(source, out, "--part-rows", 20, "--ray", "--ray-actors", 2, "--ray-cpus", 0.5, block=8, step_s=0.02)
    wait_for(lambda: len(parts_of(out)) >= 2, process, 120)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    for child in children:
        if child.is_running():
            child.kill()
    time.sleep(0.5)
    engine = FakeLLM()
    assert run_here(source, out, "--part-rows", 20, fake=engine) == 0
    assert engine.prompts_seen < 260 and read_output(out)["id"].to_pylist() == list(range(300))
    assert not list((out / ".flexbatch").glob("journal-*"))
