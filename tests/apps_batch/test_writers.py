"""Several processes that want one output: who may write, who waits, and what one that was thought dead can still do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flexbatch.apps.jobs.grants import TakenOver, grants, writers_lock
from flexbatch.apps.jobs.journal import Journal
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.plan import BatchJob, plan_job
from flexbatch.apps.jobs.settings import JobConfig
from flexbatch.apps.jobs.sources import read_parts
from flexbatch.apps.jobs.store import OutputStore
from flexbatch.config import EngineConfig
from flexbatch.validation.errors import ConfigurationError
from tests.apps_batch.fake import FakeLLM
from tests.apps_batch.helpers import journal_bytes, parts_of, read_output, run_here, start, wait_for, write_input
from tests.apps_batch.invariants import check_store

JOB = {"model": {"weights": "a"}, "seed": 0}
SHARDS = [(0, 1), (0, 2), (1, 2), (0, 3), (2, 3), (1, 4)]


def disjoint(shards: Sequence[tuple[int, int]]) -> bool:
    return len({n for _, n in shards}) <= 1 and len(set(shards)) == len(shards)


def open_at_once(
    folders: Sequence[Path], shards: Sequence[Sequence[tuple[int, int]]], starting: Any, tried: Any, won: Any
) -> None:
    """One process of a race: per round it starts two threads on shards of its own, and says which of them may write."""

    def one(folder: Path, shard: tuple[int, int], found: list[tuple[OutputStore, tuple[int, int]]]) -> None:
        starting.wait()
        try:
            found.append((OutputStore(folder, JOB, shard), shard))
        except ConfigurationError as error:
            assert "by another process" in str(error), error
        tried.wait()

    for folder, pair in zip(folders, shards, strict=True):
        found: list[tuple[OutputStore, tuple[int, int]]] = []
        threads = [threading.Thread(target=one, args=(folder, shard, found)) for shard in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        won.put((folder.name, [shard for _, shard in found]))
        for store, _ in found:
            store.close()


def race(tmp_path: Path, rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    folders = [tmp_path / str(number) for number in range(rounds)]
    starting, tried, won = context.Barrier(4), context.Barrier(4), context.Queue()
    pairs = [[SHARDS[(number + placement) % 6] for number in range(rounds)] for placement in (0, 1, 2, 3)]
    shards = [list(zip(*pairs[index : index + 2], strict=True)) for index in (0, 2)]
    racers = [
        context.Process(target=open_at_once, args=(folders, pair, starting, tried, won), daemon=True) for pair in shards
    ]
    for racer in racers:
        racer.start()
    owners: dict[str, list[tuple[int, int]]] = {folder.name: [] for folder in folders}
    for _ in range(2 * rounds):
        name, winners = won.get(timeout=120)
        owners[name] += winners
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    for name, winners in owners.items():
        assert winners and disjoint(winners), (name, winners)


def test_starts_with_different_counts_of_shards_never_own_an_output_together(tmp_path: Path) -> None:
    race(tmp_path, 25)


@pytest.mark.slow
def test_four_hundred_starts_with_different_counts_of_shards(tmp_path: Path) -> None:
    race(tmp_path, 400)


def planned(tmp_path: Path, rows: int = 40, **settings: object) -> BatchJob:
    source = tmp_path / "in.parquet"
    if not source.exists():
        write_input(source, [f"p{i}" for i in range(rows)])
    config = JobConfig(part_rows=10, **settings)  # type: ignore[arg-type]
    return plan_job(str(source), str(tmp_path / "out"), config, EngineConfig(), lambda engine: {"weights": "fake"})


def table_of(job: BatchJob, part: Part):  # type: ignore[no-untyped-def]
    return next(table for found, table in read_parts(job.source, job.parts) if found == part)


def worker(job: BatchJob, driver: OutputStore, name: str) -> OutputStore:
    assert driver.grant is not None
    return OutputStore(job.folder, job.fingerprint, worker=f"worker-{name}", grant=driver.grant.path)


def records(text: str, error: str = "") -> list[list]:
    return [[text, "stop", 1, 2, error, None, None]] * 10


def texts(path: Path) -> set[str]:
    import pyarrow.parquet as pq

    return set(pq.read_table(path)["generated_text"].to_pylist())


@pytest.mark.parametrize("links", [True, False])
def test_the_first_commit_of_a_part_counts(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on file systems without hard links."""
    if not links:

        def refuse(*paths: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    job = planned(tmp_path)
    part = job.parts[1]
    driver = OutputStore(job.folder, job.fingerprint)
    stores = [worker(job, driver, name) for name in "ab"]
    for lease, store in enumerate(stores):
        store.begin(part, job.output, lease)
    table = table_of(job, part)
    late, early = (stores[placement].commit(part, table, records("ab"[placement]), job.output) for placement in (1, 0))
    assert texts(tmp_path / "out" / "part-00001.parquet") == {"b"} and late == early
    for store in stores:
        check_store(store, [part], job.output)
        store.close()
    driver.close()
    again = OutputStore(job.folder, job.fingerprint)
    left, _ = again.recover(job.parts, job.output)
    assert [found.number for found in left] == [0, 2, 3]
    check_store(again, [part], job.output)
    again.close()


def test_a_worker_that_comes_back_replaces_no_part_that_was_written_anew(tmp_path: Path) -> None:
    job = planned(tmp_path)
    part, path = job.parts[0], tmp_path / "out" / "part-00000.parquet"
    first = OutputStore(job.folder, job.fingerprint)
    first.commit(part, table_of(job, part), records("failed", "an error"), job.output)
    first.close()
    driver = OutputStore(job.folder, job.fingerprint)
    left, _ = driver.recover(job.parts, job.output, retry_failed=True)
    assert left[0] == part
    lost, successor = worker(job, driver, "a"), worker(job, driver, "b")
    lost.begin(part, job.output, 1)
    successor.begin(part, job.output, 2)
    successor.commit(part, table_of(job, part), records("good"), job.output)
    assert lost.commit(part, table_of(job, part), records("late", "an error"), job.output).errors == 0
    assert texts(path) == {"good"} and not list(tmp_path.rglob(".part-*"))
    for store in (lost, successor, driver):
        store.close()


def take_locks_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexbatch.apps.jobs.grants.fcntl.flock", lambda descriptor, operation: None)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("by", ["shard", "worker"])
def test_who_was_replaced_commits_nothing_more(
    tmp_path: Path, overwrite: bool, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock was lost, or its driver died: it notices at its next commit, and at its next fsync."""
    take_locks_away(monkeypatch)
    job = planned(tmp_path)
    part = job.parts[2]
    lost = OutputStore(job.folder, job.fingerprint)
    if by == "worker":
        lost = worker(job, lost, "0-a")
        lost.begin(part, job.output, 1)
    other = planned(tmp_path, max_tokens=3) if overwrite else job
    successor = OutputStore(other.folder, other.fingerprint, overwrite=overwrite)
    lost.journal.append(2, 0, records("late")[0])
    with pytest.raises(TakenOver, match=r"taken over by another process, now shard 0-of-1 \(process \d+ on "):
        lost.commit(part, table_of(job, part), records("late"), job.output)
    with pytest.raises(TakenOver):
        lost.sync()
    assert parts_of(tmp_path / "out") == [] and not list(tmp_path.rglob(".part-*"))
    lost.sweep()
    lost.close()
    successor.recover(other.parts, other.output)
    successor.commit(part, table_of(other, part), records("good"), other.output)
    check_store(successor, other.parts, other.output)
    successor.close()
    if by == "worker":
        with pytest.raises(TakenOver):
            worker(job, lost, "0-b")


def test_a_job_that_is_refused_takes_nothing_from_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_locks_away(monkeypatch)
    store = OutputStore(tmp_path / "out", JOB)
    with pytest.raises(ConfigurationError, match="belongs to another job"):
        OutputStore(tmp_path / "out", {"other": 1}, (1, 2))
    store.check_writer()
    store.close()


def test_terms_grow_and_one_grant_is_left_per_shard(tmp_path: Path) -> None:
    for turn, shard in enumerate([(0, 1), (0, 2), (1, 2), (1, 2), (0, 1), (2, 3)]):
        store = OutputStore(tmp_path / "out", JOB, shard)
        assert store.grant is not None and store.grant.term == turn + 1
        store.close()
        if shard == (1, 2):
            assert [found[1:3] for found in grants(store.state)] == [(0, 2), (1, 2)]
    assert [found[:3] for found in grants(store.state)] == [(6, 2, 3)]


def test_a_lock_that_stays_taken_is_an_error_that_names_it(tmp_path: Path) -> None:
    with (
        writers_lock(tmp_path),
        pytest.raises(OSError, match=r"held the lock for 0\.05 s"),
        writers_lock(tmp_path, 0.05),
    ):
        pass


@pytest.mark.parametrize("placement", ["record", "publish"])
def test_a_crash_in_the_middle_of_a_retry_hides_no_error(
    tmp_path: Path, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of commits says what was to come, the file what is."""
    prompts = ["x" * 600, *(f"p{i}" for i in range(19))]
    source, out = write_input(tmp_path / "in.parquet", prompts), tmp_path / "out"
    assert run_here(source, out, "--part-rows", 20) == 3
    with monkeypatch.context() as patch:

        def die(*words: object) -> bool:
            raise OSError(errno.EIO, "the machine went away")

        patch.setattr(OutputStore, "_publish" if placement == "publish" else "_record", die)
        assert run_here(source, out, "--part-rows", 20, "--retry-failed", max_positions=2000) == 1
    assert journal_bytes(out) > 0, "the row that was done again is not lost"
    assert run_here(source, out, "--part-rows", 20) == 3
    engine = FakeLLM(max_positions=2000)
    assert run_here(source, out, "--part-rows", 20, "--retry-failed", fake=engine) == 0
    assert set(read_output(out)["error"].to_pylist()) == {""} and engine.prompts_seen <= 1


def test_a_copied_output_is_resumed(tmp_path: Path) -> None:
    """Its parts have other times; they are read again, once."""
    import shutil

    source, out = write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(100)]), tmp_path / "copy"
    assert run_here(source, tmp_path / "out", "--part-rows", 10) == 0
    shutil.copytree(tmp_path / "out", out, copy_function=shutil.copyfile)
    for path in parts_of(out):
        os.utime(path, (1, 1))
    engine = FakeLLM()
    assert run_here(source, out, "--part-rows", 10, fake=engine) == 0 and engine.prompts_seen == 0
    (out / "part-00003.parquet").write_bytes((out / "part-00004.parquet").read_bytes()[:-1])
    assert run_here(source, out, "--part-rows", 10) == 2


FLAGS = ("--part-rows", 20, "--window-rows", 20)
STOPS = [
    ("store:OutputStore._publish", 2), ("store:rename_if_absent", 3), ("store:OutputStore.commit", 2),
    ("records:RecordLog._write", 30), ("records:RecordLog.sync", 3), ("journal:Journal.committed", 2),
]  # fmt: skip


def stopped_process(process: subprocess.Popen[str]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def come_back(tmp_path: Path, point: tuple[str, int] | None) -> None:
    """A process is suspended, at a point or anywhere; another one, to which its locks mean nothing, takes over; the
    first wakes up while the second works, or when it is done."""
    source, out = write_input(tmp_path / "in.parquet", [f"prompt {i}" for i in range(200)]), tmp_path / "out"
    assert run_here(source, tmp_path / "whole", *FLAGS) == 0
    settings: dict[str, Any] = {"block": 8, "step_s": 0.003, "locks": False}
    stop: dict[str, Any] = {} if point is None else {"signal_at": [*point, signal.SIGSTOP]}
    first = start(source, out, *FLAGS, **settings, **stop)
    if point is None:
        wait_for(lambda: journal_bytes(out) > 3000, first)
        first.send_signal(signal.SIGSTOP)
    wait_for(lambda: stopped_process(first), first)
    second = start(source, out, *FLAGS, **settings)
    before = len(parts_of(out))
    wait_for(lambda: len(parts_of(out)) > before, second)
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1 and "was taken over by another process" in err and "Traceback" not in err, err
    _, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert read_output(out).equals(read_output(tmp_path / "whole"))
    assert run_here(source, out, *FLAGS) == 0
    assert not list(out.rglob(".part-*")) and not list(out.rglob("journal-*"))


def test_a_process_that_was_thought_dead_comes_back(tmp_path: Path) -> None:
    come_back(tmp_path, STOPS[1])


@pytest.mark.slow
@pytest.mark.parametrize("point", [None, *STOPS])
def test_a_process_that_was_thought_dead_comes_back_at_any_point(tmp_path: Path, point: tuple[str, int] | None) -> None:
    come_back(tmp_path, point)


def test_a_suspended_process_keeps_its_output_where_locks_work(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.parquet", [f"prompt {i}" for i in range(60)]), tmp_path / "out"
    first = start(source, out, *FLAGS, block=8, signal_at=["store:OutputStore.commit", 2, signal.SIGSTOP])
    wait_for(lambda: stopped_process(first), first)
    for flags in (FLAGS, (*FLAGS, "--shard", "1/3"), (*FLAGS, "--overwrite")):
        assert run_here(source, out, *flags) == 2
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert read_output(out)["id"].to_pylist() == list(range(60))


@pytest.mark.parametrize("pending", [0, 5])
def test_finished_rows_are_durable_soon_though_no_other_comes(
    tmp_path: Path, pending: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, appended = threading.Event(), list[int]()
    monkeypatch.setattr("flexbatch.apps.jobs.pipeline.SYNC_S", 0.05)
    sync, append = os.fdatasync, Journal.append

    def noted(self: Journal, part: int, row: int, record: Any) -> None:
        append(self, part, row, record)
        appended.append(row)

    def watched(descriptor: int) -> None:
        sync(descriptor)
        if "journal-" in os.readlink(f"/proc/self/fd/{descriptor}") and len(appended) == pending + 1:
            synced.set()

    monkeypatch.setattr(Journal, "append", noted)
    monkeypatch.setattr(os, "fdatasync", watched)

    class Slow(FakeLLM):
        def stream(self, items, on_tokens=None):  # type: ignore[no-untyped-def]
            for index, pair in enumerate(super().stream(items)):
                yield pair
                if index == pending:
                    lasts.append(synced.wait(60))

    lasts: list[bool] = []
    source = write_input(tmp_path / "in.parquet", [f"p{i}" for i in range(30)])
    assert run_here(source, tmp_path / "out", fake=Slow(block=4)) == 0 and lasts == [True]
