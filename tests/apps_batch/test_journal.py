from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.apps.jobs.journal import HEADER, Journal, RecordLog, read_log

JOB, OTHER = b"j" * 16, b"o" * 16
values = st.lists(st.recursive(st.none() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=4), max_size=8)


@settings(max_examples=40, deadline=None)
@given(values=values, cut=st.integers(0, 400), more=values)
def test_a_log_cut_anywhere_keeps_its_whole_records_and_goes_on(tmp_path_factory: pytest.TempPathFactory, values: list, cut: int, more: list) -> None:
    path = tmp_path_factory.mktemp("log") / "x.log"
    log = RecordLog(path, JOB)
    ends = []
    for value in values:
        log.append(value)
        ends.append(log.size)
    log.check()
    log.close()
    path.write_bytes(path.read_bytes()[:cut])
    whole = [value for value, end in zip(values, ends, strict=True) if end <= cut]
    assert list(read_log(path, JOB)) == whole
    log = RecordLog(path, JOB)
    for value in more:
        log.append(value)
    log.check()
    log.close()
    assert list(read_log(path, JOB)) == whole + more


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_flipped_byte_costs_its_record_and_what_follows_and_nothing_before(tmp_path_factory: pytest.TempPathFactory, place: int, flip: int) -> None:
    path = tmp_path_factory.mktemp("log") / "x.log"
    log, ends = RecordLog(path, JOB), [HEADER.size]
    for row in range(6):
        log.append([row, "text " * row])
        ends.append(log.size)
    log.close()
    data = bytearray(path.read_bytes())
    place = HEADER.size + place % (len(data) - HEADER.size)
    data[place] ^= flip
    path.write_bytes(bytes(data))
    before = max(row for row, end in enumerate(ends) if end <= place)
    assert list(read_log(path, JOB)) == [[row, "text " * row] for row in range(before)]


def test_a_log_of_another_job_is_refused(tmp_path: Path) -> None:
    RecordLog(tmp_path / "x.log", JOB).close()
    with pytest.raises(ValueError, match="not a log of this job"):
        list(read_log(tmp_path / "x.log", OTHER))
    with pytest.raises(ValueError, match="not a log of this job"):
        RecordLog(tmp_path / "x.log", OTHER)


def test_check_finds_bytes_that_nobody_appended(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "x.log", JOB)
    log.append(1)
    with (tmp_path / "x.log").open("ab") as file:
        file.write(b"?")
    with pytest.raises(AssertionError, match="1 records"):
        log.check()


def test_lone_surrogates_survive(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "x.log", JOB)
    log.append("\ud800 \U0001f600")
    log.close()
    assert list(read_log(tmp_path / "x.log", JOB)) == ["\ud800 \U0001f600"]


def test_segments_go_when_their_parts_are_committed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "0-of-1", JOB, segment_bytes=64)
    for row in range(12):
        journal.append(row % 2, row, "x" * 20)
    assert len(list(tmp_path.glob("*.log"))) > 3
    journal.committed(0)
    journal.check()
    found = Journal(tmp_path, "0-of-1", JOB).recover(lambda part: part == 1)
    assert sorted(found[1]) == [1, 3, 5, 7, 9, 11]
    journal.committed(1)
    journal.check()
    assert len(list(tmp_path.glob("*.log"))) == 1
    journal.close()
    assert not list(tmp_path.glob("*.log"))


def test_a_later_run_takes_over_the_segments_of_its_owner_alone(tmp_path: Path) -> None:
    for owner, part in (("0-of-2", 1), ("1-of-2", 7)):
        journal = Journal(tmp_path, owner, JOB)
        journal.append(part, 0, "old")
        journal.close()
    journal = Journal(tmp_path, "0-of-2", JOB)
    assert journal.recover(lambda part: True) == {1: {0: "old"}, 7: {0: "old"}}
    journal.append(1, 1, "new")
    journal.append(1, 0, "newer")
    journal.close()
    again = Journal(tmp_path, "0-of-2", JOB)
    assert again.recover({1}.__contains__) == {1: {0: "newer", 1: "new"}}
    again.committed(1)
    again.committed(7)
    assert [path.name for path in tmp_path.glob("*.log")] == ["journal-1-of-2.000000.log"]
