"""The output folder and its state: which parts are committed, who writes, and what a restart finds.

A part is committed when its file carries its final name. It gets it in one step, which succeeds only if this process
may still write (`grants`) and the name is as free, or the file to replace is as old, as it was when the part was begun:
whoever comes second finds the part of the first. ``.flexbatch/manifest.json`` says what the job is,
``.flexbatch/commits-*.log`` how many rows, errors and tokens each part holds, ``.flexbatch/journal-*.log`` the finished
rows of other parts.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexbatch.apps.jobs.commits import NOBODY_KNOWS, Commit, Identity, identity, read_commits
from flexbatch.apps.jobs.grants import Grant, refuse_other_writers, writers_lock
from flexbatch.apps.jobs.journal import Journal
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.manifest import (
    PART_FILE,
    STATE,
    discard_job,
    fingerprint_digest,
    open_manifest,
    refuse_other_files,
)
from flexbatch.apps.jobs.records import Order, RecordLog
from flexbatch.apps.jobs.results import Output, RowRecord, runs_again
from flexbatch.files.atomic import make_folder, rename_if_absent, sync_folder, temporary_name
from flexbatch.validation.errors import ConfigurationError, told

logger = logging.getLogger("flexbatch")
TERM_BITS = 32
"""A record's term is its writer's, times 2 to this power, plus the number of the hand-out where a writer hands parts
to workers."""


class OutputStore:
    """The parts of one shard of one job in one output folder.

    Opening it creates or compares the manifest: ConfigurationError lists the differences to another job, or says why
    the folder cannot be written. ``created`` is the unix time at which the job began, kept over restarts. With
    ``worker``, a name, this process works for another one that hands out the parts and holds ``grant``
    (`Grant.path`).
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: dict[str, Any],
        shard: tuple[int, int] = (0, 1),
        *,
        overwrite: bool = False,
        worker: str | None = None,
        grant: Path | None = None,
    ) -> None:
        self.folder, self.state = Path(folder).expanduser(), Path(folder).expanduser() / STATE
        self._owner = worker or f"{shard[0]}-of-{shard[1]}"
        self.digest = fingerprint_digest(fingerprint)
        self.grant: Grant | None = None
        try:
            if not self.state.exists():  # nothing is left in a folder that is refused
                refuse_other_files(self.folder)
            make_folder(self.state)
            sync_folder(self.folder)
            sync_folder(self.folder.parent)
            with writers_lock(self.state):
                if worker is None:
                    self.created = self._open_shard(fingerprint, shard, overwrite)
                else:
                    self.grant = None if grant is None else Grant(grant)
                    self.check_writer()
                    self.created = open_manifest(self.folder, fingerprint, False)
                self._commits_log = RecordLog(self.state / f"commits-{self._owner}.log", self.digest)
        except (OSError, ValueError) as error:
            self._release()
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(
                f"output {self.folder} cannot be written: {told(error)}"
                if isinstance(error, OSError)
                else f"{error}, though its manifest is: remove that file"
            ) from (error if isinstance(error, OSError) else None)
        self.term = self.grant.term << TERM_BITS if self.grant is not None else 0
        self.journal = Journal(self.state, self._owner, self.digest, term=self.term)
        self.commits: dict[int, Commit] = {}
        self._replaced: dict[int, Identity | None] = {}
        self._folders = {self.folder}

    def _open_shard(self, fingerprint: dict[str, Any], shard: tuple[int, int], overwrite: bool) -> int:
        """Called under the lock; returns when the job began. A job that is refused takes nothing from anybody."""
        refuse_other_writers(self.state, shard)
        created = None if overwrite else open_manifest(self.folder, fingerprint, False)
        self.grant = Grant.take(self.state, shard)
        for path in self.state.glob(".*.tmp"):  # written under the lock alone: of processes that died there
            path.unlink(missing_ok=True)
        return open_manifest(self.folder, fingerprint, discard_job(self.folder)) if created is None else created

    def _release(self) -> None:
        if self.grant is not None:
            self.grant.release()

    def check_writer(self) -> None:
        """Raises TakenOver when this process should write no more."""
        if self.grant is not None:
            self.grant.check()

    def begin(self, part: Part, output: Output, lease: int = 0) -> None:
        """Called when a worker is given this part, perhaps after another one that may still believe that it has it;
        ``lease`` counts what is handed out. The commit may replace the file that the part has by now."""
        self._replaced[part.number] = identity(self.folder / part.file_name(output.suffix))
        self.journal.lease(part.number, self.term + lease)

    def recover(
        self, parts: Sequence[Part], output: Output, retry_failed: bool = False, retry_truncated: int | None = None
    ) -> tuple[list[Part], dict[int, dict[int, RowRecord]]]:
        """Returns what is left to do: the parts without a committed file, and per part the records of the rows that are
        finished already.

        With ``retry_failed`` rows that ended in an error count as not finished, also those of committed parts: such
        a part is written anew, and replaced in one step when it is whole again. Raises ConfigurationError for a part
        file that this job did not write. So do, with ``retry_truncated``, those whose answers were cut before as many
        tokens.
        """

        def again(record: RowRecord) -> bool:
            return runs_again(record, output, retry_failed, retry_truncated)

        known = read_commits(self.state, self.digest)
        self._remove_temporary(parts, output)
        open_parts: list[Part] = []
        kept: dict[int, dict[int, RowRecord]] = {}
        since: dict[int, Order] = {}
        for part in parts:
            path = self.folder / part.file_name(output.suffix)
            found = identity(path)
            if found is None:
                open_parts.append(part)
                continue
            commit, order = known.get(part.number, {}).get(found, (None, NOBODY_KNOWS))
            if commit is None or (retry_failed and commit.errors) or retry_truncated is not None:
                try:
                    records = output.read(path, part.rows)
                except ValueError as error:
                    raise ConfigurationError(f"{error}. Remove it to have it written again") from None
                if commit is None:
                    commit = Commit.of(part.number, records, output)
                    self._record(commit, found)
                if any(map(again, records)):
                    open_parts.append(part)
                    self._replaced[part.number] = found
                    since[part.number] = order
                    kept[part.number] = {row: record for row, record in enumerate(records) if not again(record)}
                    continue
            self.commits[part.number] = commit
        self._commits_log.sync()
        wanted = {part.number for part in open_parts}
        for number, records_of in self.journal.recover_ordered(wanted.__contains__).items():
            rows = kept.setdefault(number, {})
            for row, (order, record) in records_of.items():
                # A segment outlives those of its parts that were committed, and written anew, while it holds others:
                # what the file has is older than its record only if that was written after the file.
                if not again(record) and (row not in rows or order > since.get(number, NOBODY_KNOWS)):
                    rows[row] = record
        for part in parts:
            if part.number not in wanted:
                self.journal.committed(part.number)
        return open_parts, kept

    def _remove_temporary(self, parts: Sequence[Part], output: Output) -> None:
        """Removes what processes that died had begun to write of these parts."""
        for folder in {part.folder for part in parts}:
            mine = {Path(part.file_name(output.suffix)).name for part in parts if part.folder == folder}
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(self.folder / folder):
                    if (
                        PART_FILE.fullmatch(name)
                        and name.endswith(".tmp")
                        and name[1:].split(output.suffix)[0] + output.suffix in mine
                    ):
                        (self.folder / folder / name).unlink(missing_ok=True)

    def _record(self, commit: Commit, found: Identity, order: Order = NOBODY_KNOWS) -> None:
        self._commits_log.append({**asdict(commit), "bytes": found[0], "mtime_ns": found[1]}, *order)

    def commit(self, part: Part, table: pa.Table, records: Sequence[RowRecord], output: Output) -> Commit:
        """Writes a part, makes it durable and gives it its name; where another process has committed it meanwhile, that
        one counts. Raises OSError or TakenOver; then nothing of it is visible and its journal stays."""
        path = self.folder / part.file_name(output.suffix)
        self._make_folder(path.parent)
        temporary = temporary_name(path)
        commit = Commit.of(part.number, records, output)
        try:
            output.write(temporary, table, records)
            written = identity(temporary)
            if written is None:
                raise FileNotFoundError(errno.ENOENT, "it was removed while it was written", str(temporary))
            self._record(commit, written, self.journal.order(part.number))
            self._commits_log.sync()
            with writers_lock(self.state):
                self.check_writer()
                ours = self._publish(temporary, path, self._replaced.get(part.number))
        except FileNotFoundError:  # a successor removes what its predecessors had begun
            self.check_writer()
            raise
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
        if not ours:
            commit = self._adopt(path, part, output)
        self._replaced.pop(part.number, None)
        self.commits[part.number] = commit
        self.journal.committed(part.number)
        return commit

    def _make_folder(self, folder: Path) -> None:
        """Makes a folder durable, even one that exists: perhaps a process made it that died before it was durable."""
        if folder not in self._folders:
            make_folder(folder)
            for path in (folder, *folder.parents[: len(folder.relative_to(self.folder).parts) - 1]):
                sync_folder(path.parent)
            self._folders.add(folder)

    @staticmethod
    def _publish(temporary: Path, path: Path, before: Identity | None) -> bool:
        """Called under the lock: gives the file its name if the part is what it was when it was begun."""
        if before is None or not path.exists():
            return rename_if_absent(temporary, path)
        if identity(path) != before:
            return False
        os.replace(temporary, path)
        return True

    def _adopt(self, path: Path, part: Part, output: Output) -> Commit:
        logger.warning("%s: another process has committed this part meanwhile; its rows stay", path)
        found = identity(path)
        known = read_commits(self.state, self.digest).get(part.number, {})
        if found in known:
            return known[found][0]
        try:
            commit = Commit.of(part.number, output.read(path, part.rows), output)
        except ValueError as error:
            raise OSError(
                errno.EEXIST, f"a file lies in the way that is no part of this job ({error})", str(path)
            ) from None
        if found is not None:
            self._record(commit, found)
        return commit

    def sync(self) -> None:
        """Makes what is in the journal durable. Raises OSError, and TakenOver when nobody needs it any more."""
        self.journal.sync()
        self.check_writer()

    def sweep(self) -> None:
        """Removes journals of other owners (shards of another count, workers) once all their parts are committed.
        Called only where nobody else writes."""
        if self.grant is not None and self.grant.path.exists():
            self.journal.sweep(self.commits.__contains__)

    def close(self) -> None:
        try:
            self.journal.close()
        finally:
            self._commits_log.close()
            self._release()
