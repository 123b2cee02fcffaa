"""What holds of layouts, logs, journals and output folders at any time."""

from __future__ import annotations

from collections.abc import Sequence

from flexbatch.apps.jobs.commits import Commit, identity, read_commits
from flexbatch.apps.jobs.journal import Journal
from flexbatch.apps.jobs.layout import Part, RowGroup
from flexbatch.apps.jobs.records import HEADER, RecordLog, scan_log
from flexbatch.apps.jobs.results import Output
from flexbatch.apps.jobs.store import OutputStore


def check_layout(parts: Sequence[Part], row_groups: Sequence[RowGroup]) -> None:
    """Asserts that the parts hold every row of every row group once and in order."""
    folders = [group.folder for group in row_groups for _ in range(group.rows)]
    row = 0
    for number, part in enumerate(parts):
        assert part.number == number and part.first_row == row, (
            f"part {number} begins at row {part.first_row}, expected {row}"
        )
        row += part.rows
        assert set(folders[part.first_row : row]) <= {part.folder}, (
            f"part {number} in {part.folder!r} holds rows of {folders[part.first_row : row]}"
        )
    assert row == len(folders), "the parts miss rows of the input"


def check_log(log: RecordLog) -> None:
    """Asserts that the file holds exactly the records that were appended."""
    scan = scan_log(log.path, log.fingerprint)
    end = scan.entries[-1].end if scan.entries else HEADER.size
    assert len(scan.entries) == log.records and end == log.size == len(scan.data) and not scan.damage, (
        f"{log.path}: {len(scan.entries)} records, {len(scan.data)} bytes, damage {scan.damage}; "
        f"expected {log.records} records, {log.size} bytes"
    )


def check_journal(journal: Journal) -> None:
    """Asserts that the active segment holds exactly what was appended and that no finished segment was left
    behind."""
    if journal._active is not None:
        check_log(journal._active)
    for path, parts in journal._closed.items():
        assert parts and path.exists(), f"{path} holds no part in flight and should be gone"


def check_store(store: OutputStore, parts: Sequence[Part], output: Output) -> None:
    """Asserts that every committed part holds its rows and that nothing temporary lies about."""
    check_journal(store.journal)
    check_log(store._commits_log)
    known = read_commits(store.state, store.digest)
    for part in parts:
        path = store.folder / part.file_name(output.suffix)
        assert path.exists() == (part.number in store.commits), f"{path}: committed and present disagree"
        found = identity(path)
        if found is not None:
            commit = store.commits[part.number]
            assert Commit.of(part.number, output.read(path, part.rows), output) == commit, (
                f"{path} is not what was committed"
            )
            assert known.get(part.number, {}).get(found, (None,))[0] == commit, (
                f"{path} is not what the log of commits says"
            )
        assert not list(path.parent.glob(f".{path.name}.*tmp")), f"{path}: a temporary file was left behind"
