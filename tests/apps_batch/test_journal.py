from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.apps.jobs.journal import Journal
from flexbatch.apps.jobs.records import HEADER, RecordLog, read_log, scan_log
from tests.apps_batch.invariants import check_journal, check_log

JOB, OTHER = b"j" * 16, b"o" * 16
values = st.lists(
    st.recursive(st.none() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=4), max_size=8
)


def values_of(path: Path, fingerprint: bytes) -> list:
    return [record.value for record in read_log(path, fingerprint)]


@settings(max_examples=40, deadline=None)
@given(values=values, cut=st.integers(0, 400), more=values)
def test_a_log_cut_anywhere_keeps_its_whole_records_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, values: list, cut: int, more: list
) -> None:
    path = tmp_path_factory.mktemp("log") / "x.log"
    log = RecordLog(path, JOB)
    ends = []
    for value in values:
        log.append(value)
        ends.append(log.size)
    check_log(log)
    log.close()
    path.write_bytes(path.read_bytes()[:cut])
    whole = [value for value, end in zip(values, ends, strict=True) if end <= cut]
    assert values_of(path, JOB) == whole
    log = RecordLog(path, JOB)
    for value in more:
        log.append(value)
    check_log(log)
    log.close()
    assert values_of(path, JOB) == whole + more


def small_log(path: Path) -> tuple[bytes, list[int], list[list]]:
    """Bytes, ends of the header and of the records, and values of a log of a few records."""
    log, values = RecordLog(path, JOB), [[row, "text " * row] for row in range(4)]
    ends = [log.size]
    for value in values:
        log.append(value)
        ends.append(log.size)
    log.close()
    return path.read_bytes(), ends, values


def damaged(path: Path, data: bytes) -> tuple[list, list]:
    path.write_bytes(data)
    scan = scan_log(path, JOB)
    return [entry.value for entry in scan.entries], scan.damage


def test_every_truncation_and_every_zero_tail_is_a_torn_tail(tmp_path: Path) -> None:
    """What a loss of power leaves: the file ends anywhere, or is longer than what was written of it, by any length."""
    path = tmp_path / "x.log"
    data, ends, values = small_log(path)
    for cut in range(len(data) + 1):
        whole = [value for value, end in zip(values, ends[1:], strict=True) if end <= cut]
        for zeros in (0, 1, 7, 8, 32, len(data) - cut, 4096):
            assert damaged(path, data[:cut] + bytes(zeros)) == (whole, []), (cut, zeros)
    for cut in (0, 3, HEADER.size, HEADER.size + 9, ends[2], ends[2] + 40, len(data)):
        path.write_bytes(data[:cut] + bytes(600))
        log = RecordLog(path, JOB)
        log.append("more")
        check_log(log)
        log.close()
        assert values_of(path, JOB)[-1] == "more" and log.records == 1 + sum(end <= cut for end in ends[1:])


def test_every_flipped_bit_costs_its_record_alone_and_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    data, ends, values = small_log(path)
    for position, bit in itertools.product(range(len(data)), range(8)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        lost = sum(end <= position for end in ends) - 1
        found, damage = damaged(path, bytes(flipped))
        assert found == [value for row, value in enumerate(values) if row != lost], (position, bit)
        assert damage == [(ends[lost] if lost >= 0 else 0, ends[lost + 1])], (position, bit)


@pytest.mark.parametrize("page", [512, 4096])
def test_pages_that_never_reached_the_disk_cost_the_records_in_them_alone(tmp_path: Path, page: int) -> None:
    path, chance = tmp_path / "x.log", random.Random(page)
    log, ends = RecordLog(path, JOB), [HEADER.size]
    for row in range(120):
        log.append([row, "x" * chance.randrange(300)])
        ends.append(log.size)
    log.close()
    data = path.read_bytes()
    for _ in range(60):
        gone = [start for start in range(0, len(data), page) if chance.random() < 0.3]
        torn = bytearray(data)
        for start in gone:
            torn[start : start + page] = bytes(len(torn[start : start + page]))
        found, damage = damaged(path, bytes(torn))
        hit = {start // page for start in gone}
        kept = [r for r in range(120) if not hit & set(range(ends[r] // page, (ends[r + 1] - 1) // page + 1))]
        assert [row for row, _ in found] == kept
        later = [start for start in gone if kept and start < ends[kept[-1]]]
        assert bool(damage) >= bool(later), "what lies before a whole record is no tail"


def test_damage_is_reported_by_whoever_reads_or_takes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal-0-of-1.000000.log"
    for read in (
        lambda: values_of(path, JOB), lambda: Journal(tmp_path, "0-of-1", JOB).recover(lambda part: True),
        lambda: RecordLog(path, JOB).close(),
    ):  # fmt: skip
        path.unlink(missing_ok=True)
        log = RecordLog(path, JOB)
        for row in range(3):
            log.append([0, row, "x"])
        log.close()
        data = bytearray(path.read_bytes())
        data[HEADER.size + 40] ^= 1
        path.write_bytes(data)
        caplog.clear()
        read()
        assert f"{path}: bytes 24 to 65 of" in caplog.text and "2 whole records of this file are kept" in caplog.text


def test_records_within_the_text_of_a_record_are_text(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    data, ends, _ = small_log(path)
    inner = data[ends[0] :].decode("latin-1")
    log = RecordLog(path, JOB)
    log.append(inner)
    log.append("after")
    log.close()
    torn = bytearray(path.read_bytes())
    torn[ends[-1] + 2] ^= 1
    found, damage = damaged(path, bytes(torn))
    assert found[-1] == "after" and len(found) == 5 and len(damage) == 1


def test_taking_a_log_over_leaves_its_old_writer_alone(tmp_path: Path) -> None:
    old = RecordLog(tmp_path / "x.log", JOB)
    old.append("before")
    new = RecordLog(tmp_path / "x.log", JOB)
    old.append("of a process that everybody thought dead")
    new.append("after")
    old.append("again")
    check_log(new)
    assert values_of(tmp_path / "x.log", JOB) == ["before", "after"]
    with pytest.raises(FileExistsError):
        RecordLog(tmp_path / "x.log", JOB, new=True)


OWNERS = ("0-of-1", "0-of-2", "1-of-2", "worker-0-a", "worker-10-b", "3-of-12")


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(OWNERS, 2)))
def test_later_records_win_whatever_their_owners_are_called(tmp_path: Path, first: str, second: str) -> None:
    for owner, record in ((first, "error"), (second, "success")):
        journal = Journal(tmp_path, owner, JOB)
        journal.recover(lambda part: False)
        journal.append(3, 4, record)
        journal.close()
    for owner in (first, second, "5-of-7"):
        assert Journal(tmp_path, owner, JOB).recover(lambda part: True) == {3: {4: "success"}}


def test_order_survives_segments_and_clocks_that_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6, 0, -1))
    monkeypatch.setattr("flexbatch.apps.jobs.journal.time.time_ns", lambda: next(clock))
    latest = {}
    for turn in range(24):
        journal = Journal(tmp_path, OWNERS[(turn * 5) % len(OWNERS)], JOB, segment_bytes=100)
        journal.recover(lambda part: False)
        for row in range(turn % 4, 6):
            journal.append(0, row, turn)
            latest[row] = turn
        journal.close()
    assert Journal(tmp_path, "x", JOB).recover(lambda part: True) == {0: latest}


def test_a_writer_that_was_replaced_adds_nothing_that_counts_against_its_successor(tmp_path: Path) -> None:
    zombie = Journal(tmp_path, "0-of-1", JOB, term=1 << 32)
    zombie.append(0, 0, "old")
    successor = Journal(tmp_path, "0-of-1", JOB, term=2 << 32)
    assert successor.recover(lambda part: True) == {0: {0: "old"}}
    successor.append(0, 0, "new")
    for sequence in range(3):
        zombie.append(0, 0, "late")
        zombie._rotate()
        successor._rotate()
        successor.append(0, 1, sequence)
    zombie.append(0, 2, "late, and the only one")
    assert Journal(tmp_path, "0-of-1", JOB).recover(lambda part: True) == {
        0: {0: "new", 1: 2, 2: "late, and the only one"}
    }
    check_journal(successor)
    zombie.close()
    successor.close()


def test_leases_order_the_writers_of_one_part(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, "worker-1-b", JOB, term=64), Journal(tmp_path, "worker-0-a", JOB, term=64)
    first.lease(5, 65)
    second.lease(5, 66)
    second.append(5, 0, "of the second lease")
    first.append(5, 0, "late")
    assert Journal(tmp_path, "x", JOB).recover(lambda part: True) == {5: {0: "of the second lease"}}


def test_sweeping_keeps_the_rows_of_parts_that_are_not_finished(tmp_path: Path) -> None:
    for owner, part in (("0-of-2", 0), ("worker-a", 1)):
        journal = Journal(tmp_path, owner, JOB)
        journal.append(part, 0, "row")
        journal.close()
    mine = Journal(tmp_path, "0-of-1", JOB)
    mine.append(0, 1, "row")
    mine.sweep({0}.__contains__)
    check_journal(mine)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "journal-0-of-1.000000.log",
        "journal-worker-a.000000.log",
    ]
    mine.close()


def test_files_that_are_no_segments_of_this_job_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "journal-notes.log").write_text("mine")
    foreign = RecordLog(tmp_path / "journal-0-of-1.000000.log", OTHER)
    foreign.append([0, 0, "of another job"])
    foreign.close()
    journal = Journal(tmp_path, "0-of-1", JOB)
    assert journal.recover(lambda part: True) == {} and "is not a log of this job: left alone" in caplog.text
    journal.append(0, 1, "mine")
    journal.sweep(lambda part: True)
    journal.committed(0)
    journal.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal-0-of-1.000000.log", "journal-notes.log"]


def test_a_log_of_another_job_is_refused(tmp_path: Path) -> None:
    RecordLog(tmp_path / "x.log", JOB).close()
    with pytest.raises(ValueError, match="not a log of this job"):
        values_of(tmp_path / "x.log", OTHER)
    with pytest.raises(ValueError, match="not a log of this job"):
        RecordLog(tmp_path / "x.log", OTHER)


def test_check_finds_bytes_that_nobody_appended(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "x.log", JOB)
    log.append(1)
    with (tmp_path / "x.log").open("ab") as file:
        file.write(b"?")
    with pytest.raises(AssertionError, match="1 records"):
        check_log(log)


def test_lone_surrogates_survive(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "x.log", JOB)
    log.append("\ud800 \U0001f600")
    log.close()
    assert values_of(tmp_path / "x.log", JOB) == ["\ud800 \U0001f600"]


def test_segments_go_when_their_parts_are_committed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "0-of-1", JOB, segment_bytes=64)
    for row in range(12):
        journal.append(row % 2, row, "x" * 20)
    assert len(list(tmp_path.glob("*.log"))) > 3
    journal.committed(0)
    check_journal(journal)
    found = Journal(tmp_path, "0-of-1", JOB).recover(lambda part: part == 1)
    assert sorted(found[1]) == [1, 3, 5, 7, 9, 11]
    journal.committed(1)
    check_journal(journal)
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
