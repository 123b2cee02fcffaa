"""What workers still write when their driver stops is there for who resumes the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexbatch.apps.jobs.runner import Shard, close_shard
from flexbatch.apps.jobs.shard_assignment import ShardAssignment
from flexbatch.apps.jobs.store import OutputStore
from tests.apps_batch.test_writers import planned, records, table_of, worker

ROW = records("finished late")[0]


@pytest.mark.parametrize("had", ["opened its journal", "committed a part", "committed a part that the driver counted"])
def test_a_driver_that_stops_takes_no_journal_from_a_worker(tmp_path: Path, had: str) -> None:
    """All that it holds by then is of finished parts, or nothing at all; what follows is not."""
    job = planned(tmp_path)
    driver = Shard.open(job, ShardAssignment())
    busy = worker(job, driver.store, "0-a")
    if had == "opened its journal":
        busy.journal._rotate()
    else:
        for row in range(10):
            busy.journal.append(0, row, ROW)
        driver.store.commits[0] = busy.commit(job.parts[0], table_of(job, job.parts[0]), [ROW] * 10, job.output)
    if had == "committed a part":
        driver.store.commits.clear()
    close_shard(driver, ShardAssignment())
    busy.journal.append(1, 3, ROW)
    busy.close()
    again = Shard.open(job, ShardAssignment())
    assert again.finished[1] == {3: ROW}
    for part in again.left:
        again.store.commit(part, table_of(job, part), [ROW] * part.rows, job.output)
    close_shard(again, ShardAssignment())
    assert not list(tmp_path.rglob("journal-*")), "and nothing is left of a job that is done"


def test_journals_of_others_stay_where_a_shard_is_one_of_several(tmp_path: Path) -> None:
    job = planned(tmp_path)
    one, other = Shard.open(job, ShardAssignment(0, 2)), Shard.open(job, ShardAssignment(1, 2))
    other.store.journal.append(other.left[0].number, 2, ROW)
    for part in one.left:
        one.store.commit(part, table_of(job, part), [ROW] * part.rows, job.output)
    close_shard(one, ShardAssignment(0, 2))
    other.store.close()
    store = OutputStore(job.folder, job.fingerprint, (1, 2))
    assert store.recover(other.parts, job.output)[1] == {other.left[0].number: {2: ROW}}
    store.close()
