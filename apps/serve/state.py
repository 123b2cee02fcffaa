"""What the server keeps over restarts: a folder with one lock, one SQLite database, the files, and the output folders
of batches that have not ended.

::

    lock            held by the one server of this folder, for as long as it lives
    server.db       which files and batches there are, and how far batches are
    files/ID        the content of one file; it is whole before the database names it
    batches/ID/     of one batch: its input (a link), and the output folder with the journal of `flexbatch batch`
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexbatch.files.atomic import make_folder, sync_folder
from flexbatch.validation.errors import ConfigurationError

FILE_ID, BATCH_ID = re.compile(r"file-[0-9a-f]{24}", re.ASCII), re.compile(r"batch_[0-9a-f]{24}", re.ASCII)
SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, ended INTEGER NOT NULL, body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS batches_by_end ON batches (ended, seq);
"""
ENDED = ("completed", "failed", "expired", "cancelled")
Body = dict[str, Any]
"""A file or batch, as the API shows it."""


class ServerState:
    """The state folder of one server. Any thread may ask. Raises ConfigurationError where another server has it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.batches = folder, folder / "files", folder / "batches"
        try:
            new = not folder.exists()
            for path in (folder, self.files, self.batches):
                make_folder(path)
            if new:
                folder.chmod(0o700)  # it holds prompts
            self._lock_file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(f"--state-dir {folder} cannot be written: {error.strerror}") from None
        self._take_lock()
        self._lock = threading.RLock()
        self._database = sqlite3.connect(folder / "server.db", check_same_thread=False, isolation_level=None)
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            # What a client was told is on the disk: a file that was taken, a batch that was made.
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            self.close()
            raise ConfigurationError(f"--state-dir {folder}: server.db cannot be read ({error})") from None

    def _take_lock(self) -> None:
        """The lock ends with the process, however that ends."""
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(self._lock_file, 32).decode(errors="replace").strip()
            os.close(self._lock_file)
            raise ConfigurationError(
                f"--state-dir {self.folder} belongs to a server that runs{f' (process {owner})' * bool(owner)}: stop "
                "it, or give this one another folder"
            ) from None
        os.ftruncate(self._lock_file, 0)
        os.pwrite(self._lock_file, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        with self._lock:
            self._database.close()
            os.close(self._lock_file)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the body, or nothing. Raises OSError for a disk that is full, or fails."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                self._database.execute("COMMIT")
            except sqlite3.OperationalError as error:
                number = errno.ENOSPC if "full" in str(error) else errno.EIO
                raise OSError(number, str(error), str(self.folder / "server.db")) from error
            finally:
                # After some errors SQLite has rolled back itself, after others it waits to be told.
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    def _one(self, query: str, *values: Any) -> Any:
        with self._lock:
            row = self._database.execute(query, values).fetchone()
        return None if row is None else json.loads(row[0])

    # Settings

    def setting(self, name: str) -> Any:
        return self._one("SELECT value FROM settings WHERE name = ?", name)

    def set_setting(self, name: str, value: Any) -> None:
        with self._writing() as database:
            database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value)))

    # Files

    def path_of(self, file_id: str) -> Path:
        assert FILE_ID.fullmatch(file_id), file_id
        return self.files / file_id

    def add_file(self, body: Body) -> None:
        """Name a file whose content is in place."""
        sync_folder(self.files)
        with self._writing() as database:
            database.execute("INSERT INTO files (id, body) VALUES (?, ?)", (body["id"], json.dumps(body)))

    def file(self, file_id: str) -> Body | None:
        if not FILE_ID.fullmatch(file_id):
            return None
        return self._one("SELECT body FROM files WHERE id = ?", file_id)

    def remove_file(self, file_id: str) -> bool:
        """Whether there was one. Batches that read it have a link of their own."""
        if self.file(file_id) is None:
            return False
        with self._writing() as database:
            database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path_of(file_id).unlink(missing_ok=True)
        return True

    def page(self, table: str, limit: int, after: str | None, newest_first: bool = True) -> list[Body] | None:
        """The files or batches behind ``after``, at most ``limit``; None where that is none of them."""
        assert table in ("files", "batches")
        with self._lock:
            start = None
            if after is not None:
                start = self._database.execute(f"SELECT seq FROM {table} WHERE id = ?", (after,)).fetchone()
                if start is None:
                    return None
            sign, order = ("<", "DESC") if newest_first else (">", "ASC")
            where, values = ("", ()) if start is None else (f"WHERE seq {sign} ?", start)
            rows = self._database.execute(
                f"SELECT body FROM {table} {where} ORDER BY seq {order} LIMIT ?", (*values, limit)
            ).fetchall()
        return [json.loads(body) for (body,) in rows]

    # Batches

    def folder_of(self, batch_id: str) -> Path:
        assert BATCH_ID.fullmatch(batch_id), batch_id
        return self.batches / batch_id

    def add_batch(self, body: Body, most: int) -> bool:
        """Make a batch of its body, with a link to its input; False where ``most`` have not ended yet."""
        folder = self.folder_of(body["id"])
        make_folder(folder)
        source, link = self.path_of(body["input_file_id"]), folder / "input.jsonl"
        try:
            os.link(source, link)
        except FileNotFoundError:
            folder.rmdir()
            raise
        except OSError:  # a file system without hard links
            shutil.copyfile(source, link)
        sync_folder(folder)
        with self._writing() as database:
            if database.execute("SELECT count(*) FROM batches WHERE NOT ended").fetchone()[0] >= most:
                self.remove_batch_folder(body["id"])
                return False
            database.execute("INSERT INTO batches (id, ended, body) VALUES (?, 0, ?)", (body["id"], json.dumps(body)))
        return True

    def batch(self, batch_id: str) -> Body | None:
        if not BATCH_ID.fullmatch(batch_id):
            return None
        return self._one("SELECT body FROM batches WHERE id = ?", batch_id)

    def change_batch(self, batch_id: str, change: Callable[[Body], None], files: tuple[Body, ...] = ()) -> Body:
        """Change a batch that has not ended, and name the files of its results, in one step; returns it. One that has
        ended stays as it is."""
        with self._writing() as database:
            body = self.batch(batch_id)
            assert body is not None, batch_id
            if body["status"] not in ENDED:
                change(body)
                for file in files:
                    database.execute("INSERT INTO files (id, body) VALUES (?, ?)", (file["id"], json.dumps(file)))
                ended = body["status"] in ENDED
                database.execute(
                    "UPDATE batches SET body = ?, ended = ? WHERE id = ?", (json.dumps(body), ended, batch_id)
                )
        return body

    def unfinished_batches(self) -> list[Body]:
        """Those that have not ended, the oldest first."""
        with self._lock:
            rows = self._database.execute("SELECT body FROM batches WHERE NOT ended ORDER BY seq").fetchall()
        return [json.loads(body) for (body,) in rows]

    def remove_batch_folder(self, batch_id: str) -> None:
        shutil.rmtree(self.folder_of(batch_id), ignore_errors=True)

    # Restarts

    def sweep(self) -> None:
        """Remove what a server that was killed has left: half of an upload, files that nobody was told of, folders of
        batches that have ended. Called before anybody is served."""
        with self._lock:
            kept = {row[0] for row in self._database.execute("SELECT id FROM files")}
            open_batches = {row[0] for row in self._database.execute("SELECT id FROM batches WHERE NOT ended")}
        for path in self.files.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)
        for path in self.batches.iterdir():
            if path.name not in open_batches:
                shutil.rmtree(path, ignore_errors=True)

    def check(self) -> None:
        """Invariants: every file that is named is there and whole, and so is the input of every batch that goes on."""
        with self._lock:
            rows = self._database.execute("SELECT body FROM files").fetchall()
            for body in (json.loads(row[0]) for row in rows):
                assert self.path_of(body["id"]).stat().st_size == body["bytes"], body
            for body in self.unfinished_batches():
                assert (self.folder_of(body["id"]) / "input.jsonl").exists(), body
