"""The output folder and its state: which parts are committed, who writes, and what a restart finds.

A part is committed when its file carries its final name; renaming is the only step that commits. ``.flexbatch/manifest.json`` says what the job is,
``.flexbatch/commits-*.log`` how many rows, errors and tokens each part holds, ``.flexbatch/journal-*.log`` the finished rows of other parts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from flexbatch.apps.jobs.journal import Journal, RecordLog, read_log
from flexbatch.apps.jobs.layout import Part
from flexbatch.apps.jobs.results import Output, Record
from flexbatch.config import ConfigurationError

STATE = ".flexbatch"
PART_FILE = re.compile(r"\.?part-\d{5,}\.(parquet|jsonl)(\.tmp)?")


@dataclass(frozen=True)
class Commit:
    """What one committed part holds."""

    part: int
    rows: int
    errors: int
    input_tokens: int
    generated_tokens: int


def fingerprint_digest(fingerprint: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).digest()[:16]


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """``generation.temperature: 0.0 in the output, 0.7 now`` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key, "absent"), new.get(key, "absent"), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {old if isinstance(old, str) else json.dumps(old)} in the output, {new if isinstance(new, str) else json.dumps(new)} now"


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class OutputStore:
    """The parts of one shard of one job in one output folder.

    Opening it creates or compares the manifest: ConfigurationError lists the differences to another job, or says why the folder cannot be written.
    ``created`` is the unix time at which the job began, kept over restarts. With ``worker``, a name, this process works for another one that holds the
    lock and hands out the parts.
    """

    def __init__(
        self, folder: str | Path, fingerprint: dict[str, Any], shard: tuple[int, int] = (0, 1), *, overwrite: bool = False, worker: str | None = None
    ) -> None:
        self.folder, self.state = Path(folder).expanduser(), Path(folder).expanduser() / STATE
        self._owner = worker or f"{shard[0]}-of-{shard[1]}"
        self._lock: IO[str] | None = None
        self.digest = fingerprint_digest(fingerprint)
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            if worker is None:
                self._take_lock(shard)
            ours = overwrite and self._discard()
            self.created = self._manifest(fingerprint, ours)
            self._commits_log = RecordLog(self.state / f"commits-{self._owner}.log", self.digest)
        except OSError as error:
            self._unlock()
            raise ConfigurationError(f"output {self.folder} cannot be written: {error}") from None
        except (ConfigurationError, ValueError):
            self._unlock()
            raise
        self.journal = Journal(self.state, self._owner, self.digest)
        self.commits: dict[int, Commit] = {}

    def _take_lock(self, shard: tuple[int, int]) -> None:
        """One process per shard, and only shards of one and the same count, at one time."""
        for path in {*self.state.glob("lock-*"), self.state / f"lock-{self._owner}"}:
            mine = path.name == f"lock-{self._owner}"
            if not mine and path.name.endswith(f"-of-{shard[1]}"):
                continue
            file = path.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise ConfigurationError(f"output {self.folder} is being written by another process, as shard {path.name[5:]}") from None
            if mine:
                self._lock = file
            else:
                file.close()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _manifest(self, fingerprint: dict[str, Any], ours: bool) -> int:
        path = self.state / "manifest.json"
        if not path.exists():
            others = [entry.name for entry in self.folder.iterdir() if entry.name != STATE]
            if others and not ours:
                raise ConfigurationError(f"output {self.folder} already holds {', '.join(sorted(others)[:3])} and no job of FlexBatch: choose an empty folder")
            temporary = self.state / f".manifest-{os.getpid()}-{self._owner}.tmp"
            with temporary.open("w") as file:
                json.dump({"format": 1, "created": int(time.time()), "fingerprint": fingerprint}, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)  # unlike a rename it never replaces the manifest that another shard has just written
            except FileExistsError:
                pass
            except OSError:
                os.replace(temporary, path)
            temporary.unlink(missing_ok=True)
            sync_folder(self.state)
        try:
            found = json.loads(path.read_text())
            changes = list(differences(found["fingerprint"], fingerprint))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} is damaged ({error}): restore it, or start over with --overwrite") from None
        if changes:
            listing = "\n  ".join(changes[:20] + ([f"and {len(changes) - 20} more"] if len(changes) > 20 else []))
            raise ConfigurationError(
                f"output {self.folder} belongs to another job:\n  {listing}\nUse those settings, another output folder, or --overwrite to start over"
            )
        return int(found["created"])

    def _discard(self) -> bool:
        """Removes parts and state of whatever job wrote here, if one did; other files stay. The manifest goes last, so that it can be repeated."""
        if not (self.state / "manifest.json").exists():
            return False
        for path in self.folder.rglob("*part-*"):
            if PART_FILE.fullmatch(path.name) and path.is_file():
                path.unlink()
        for path in [*self.state.glob("*.log"), self.state / "manifest.json"]:
            path.unlink(missing_ok=True)
        for path in sorted((path for path in self.folder.rglob("*=*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()
        return True

    def recover(self, parts: Sequence[Part], output: Output, retry_failed: bool = False) -> tuple[list[Part], dict[int, dict[int, Record]]]:
        """What is left to do: the parts without a committed file, and per part the records of the rows that are finished already.

        With ``retry_failed`` rows that ended in an error count as not finished, also those of committed parts: such a part is written anew, and
        replaced in one step when it is whole again. Raises ConfigurationError for a part file that this job did not write.
        """
        known = {record["part"]: Commit(**record) for path in self.state.glob("commits-*.log") for record in read_log(path, self.digest)}
        open_parts: list[Part] = []
        kept: dict[int, dict[int, Record]] = {}
        for part in parts:
            path = self.folder / part.file_name(output.suffix)
            path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)
            if not path.exists():
                open_parts.append(part)
                continue
            commit = known.get(part.number)
            if commit is None or (retry_failed and commit.errors):
                try:
                    records = output.read(path, part.rows)
                except ValueError as error:
                    raise ConfigurationError(f"{error}. Remove it to have it written again") from None
                commit = self._commit(part, records, output)
                if retry_failed and commit.errors:
                    open_parts.append(part)
                    kept[part.number] = {row: record for row, record in enumerate(records) if not output.error_of(record)}
                    continue
            self.commits[part.number] = commit
        wanted = {part.number for part in open_parts}
        for number, records_of in self.journal.recover(wanted.__contains__).items():
            kept.setdefault(number, {}).update({row: record for row, record in records_of.items() if not (retry_failed and output.error_of(record))})
        for part in parts:
            if part.number not in wanted:
                self.journal.committed(part.number)
        return open_parts, kept

    @staticmethod
    def _commit(part: Part, records: Sequence[Record], output: Output) -> Commit:
        tokens = [output.tokens_of(record) for record in records]
        errors = sum(bool(output.error_of(record)) for record in records)
        return Commit(part.number, part.rows, errors, sum(used for used, _ in tokens), sum(made for _, made in tokens))

    def commit(self, part: Part, table: pa.Table, records: Sequence[Record], output: Output) -> Commit:
        """Writes a part, makes it durable and renames it into place. Raises OSError; then nothing of it is visible and its journal stays."""
        path = self.folder / part.file_name(output.suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        commit = self._commit(part, records, output)
        try:
            output.write(temporary, table, records)
            self._commits_log.append(asdict(commit))
            self._commits_log.sync()
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
        self.commits[part.number] = commit
        self.journal.committed(part.number)
        return commit

    def sweep(self, parts: Sequence[Part], output: Output) -> None:
        """Removes journals of other owners (shards of another count, workers) once all their parts are committed. Only where nobody else writes."""
        open_parts = {part.number for part in parts if not (self.folder / part.file_name(output.suffix)).exists()}
        for path in self.state.glob("journal-*.log"):
            if not any(part in open_parts for part, _, _ in read_log(path, self.digest)):
                path.unlink()

    def close(self) -> None:
        try:
            self.journal.close()
        finally:
            self._commits_log.close()
            self._unlock()

    def check(self, parts: Sequence[Part], output: Output) -> None:
        """Asserts that every committed part holds its rows and that nothing temporary lies about."""
        self.journal.check()
        self._commits_log.check()
        for part in parts:
            path = self.folder / part.file_name(output.suffix)
            assert path.exists() == (part.number in self.commits), f"{path}: committed and present disagree"
            if path.exists():
                assert self._commit(part, output.read(path, part.rows), output) == self.commits[part.number], f"{path} is not what was committed"
            assert not path.with_name(f".{path.name}.tmp").exists(), f"{path}: a temporary file was left behind"
