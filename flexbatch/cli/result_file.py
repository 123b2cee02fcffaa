"""The rows of `flexbatch run --output`: written in order as they finish, kept when the run ends early, and gone on with
by the same command.

Beside the output lies ``OUTPUT.resume`` for as long as rows are missing: what the run was asked, as JSON. It is
locked while a run writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from flexbatch.files.atomic import replacing
from flexbatch.text.files import json_text
from flexbatch.validation.errors import ConfigurationError, reason

STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
SHOWN_CHARACTERS = 60
"""Characters of a setting's value that are shown where the rows of another run are refused."""


class ResultFile:
    """Rows by their index, in any order; the file has them in order. A context manager that keeps what is there when
    the body fails.

    Opened before anything is loaded: raises ConfigurationError for a folder that cannot be written to, or another
    run that writes the same file. A file of an earlier run that ended is replaced when the first row is there.
    """

    def __init__(self, path: str | Path) -> None:
        self.resumable = True
        self.path = Path(os.path.realpath(path))
        self.state_path = self.path.with_name(f"{self.path.name}.resume")
        self.done: list[dict[str, Any]] = []
        """Rows that an earlier run has left."""
        self._waiting: dict[int, dict[str, Any]] = {}
        self._next, self._total = 0, 0
        self._facts: Mapping[str, Any] = {}
        self._rows: BinaryIO | None = None
        try:
            _check_writable(self.path)
            self._state = _locked(self.state_path)
        except OSError as error:
            raise ConfigurationError(f"output {path}: cannot be written: {reason(error)}") from error

    def __enter__(self) -> ResultFile:
        return self

    def begin(self, facts: Mapping[str, Any], prompts: Sequence[Any]) -> int:
        """How many of the first rows are there already. ``facts``: what rows depend on, by name.

        Raises ConfigurationError when the rows that are there are of a run that was asked something else.
        """
        self._facts, self._total = json.loads(json.dumps(facts, default=str)), len(prompts)
        written = self._state.read()
        if written and self.path.exists() and self.path.stat().st_size:
            self._refuse_others(written)
            self.done = self._rows_there(prompts)
        self._next = len(self.done)
        return self._next

    def _refuse_others(self, written: bytes) -> None:
        remedy = f"To begin anew, remove {self.state_path}"
        try:
            before = json.loads(written)
        except ValueError:
            raise ConfigurationError(
                f"{self.state_path} is damaged, so that nobody knows which run the rows in {self.path} are of. {remedy}"
            ) from None
        changed = [name for name in dict.fromkeys((*before, *self._facts)) if before.get(name) != self._facts.get(name)]
        if changed:
            differences = "; ".join(
                f"{name} was {_shown(before.get(name))}, and is {_shown(self._facts.get(name))}" for name in changed
            )
            raise ConfigurationError(
                f"{self.path} holds rows of another run: {differences}. Give what was given then to go on. {remedy}"
            )

    def _rows_there(self, prompts: Sequence[Any]) -> list[dict[str, Any]]:
        """Whole lines; what a killed run has left of one more is cut off."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        remedy = f"remove {self.state_path} to begin anew"
        rows = []
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
            except ValueError:
                raise ConfigurationError(
                    f"{self.path}: line {number} is no row of a run that ended early: it was changed; {remedy}"
                ) from None
            if number > len(prompts) or not isinstance(row, dict) or row.get("prompt") != prompts[number - 1]:
                raise ConfigurationError(
                    f"{self.path}: line {number} does not answer prompt {number - 1}: the file was changed; {remedy}"
                )
            rows.append(row)
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return rows

    def add(self, index: int, row: dict[str, Any]) -> None:
        """A row that has finished. It is written when those before it are there."""
        self._waiting[index] = row
        if index != self._next:
            return
        stream = self._open_rows()
        while self._next in self._waiting:
            stream.write(f"{json_text(self._waiting.pop(self._next))}\n".encode())
            self._next += 1
        stream.flush()

    def _open_rows(self) -> BinaryIO:
        if self._rows is None:
            if not self.done:
                # Emptied before the state says whose rows these are: an older file's would pass for this run's.
                with open(self.path, "wb") as emptied:
                    os.fsync(emptied.fileno())
                self._state.seek(0)
                self._state.truncate()
                self._state.write(json.dumps(self._facts).encode())
                self._state.flush()
                os.fsync(self._state.fileno())
            self._rows = open(self.path, "ab")  # noqa: SIM115 (closed at exit)
        return self._rows

    @property
    def written(self) -> int:
        return self._next

    def check(self) -> None:
        assert len(self.done) <= self._next <= self._total or not self._total
        assert self._next not in self._waiting, f"row {self._next} has finished and is not written"
        assert all(self._next < index < self._total for index in self._waiting)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The rows are on the disk; with all of them there the state goes, and so it does when there is none."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._state.close)
            if self._rows is not None:
                stack.callback(self._rows.close)
                self._rows.flush()
                os.fsync(self._rows.fileno())
            if (kind is None and self._next == self._total) or not os.fstat(self._state.fileno()).st_size:
                self.state_path.unlink(missing_ok=True)


class ResultStream:
    """Rows in order into a pipe or a device, where nothing can be gone on with."""

    def __init__(self, stream: TextIO) -> None:
        self.written, self.resumable = 0, False
        self.done: list[dict[str, Any]] = []
        self._stream = stream
        self._waiting: dict[int, str] = {}

    def __enter__(self) -> ResultStream:
        return self

    def begin(self, facts: Mapping[str, Any], prompts: Sequence[Any]) -> int:
        return 0

    def add(self, index: int, row: dict[str, Any]) -> None:
        self._waiting[index] = f"{json_text(row)}\n"
        while self.written in self._waiting:
            self._stream.write(self._waiting.pop(self.written))
            self.written += 1
        self._stream.flush()

    def check(self) -> None:
        assert self.written not in self._waiting

    def __exit__(self, *_: object) -> None:
        self._stream.flush()


@contextlib.contextmanager
def results(path: str, data: TextIO) -> Iterator[ResultFile | ResultStream]:
    """Where ``--output`` points. Raises ConfigurationError when it cannot be written."""
    if path in STDOUT:
        with ResultStream(data) as out:
            yield out
    elif os.path.exists(path) and not os.path.isdir(path) and not stat.S_ISREG(os.stat(path).st_mode):
        try:
            stream = open(path, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise ConfigurationError(f"output {path}: cannot be written: {reason(error)}") from error
        with stream, ResultStream(stream) as out:
            yield out
    else:
        with ResultFile(path) as out:
            yield out


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _check_writable(path: Path) -> None:
    """Raises OSError. A file that is there is opened and left as it is; of one that is not, its folder has to take
    the file of the state."""
    if path.exists():
        with open(path, "r+b"):
            pass


def _locked(path: Path) -> BinaryIO:
    """The file of the state, made if need be, with a lock that ends with the process. Raises ConfigurationError when
    another run has it."""
    while True:
        file = open(path, "a+b")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigurationError(
                f"{path.with_suffix('')} is being written by another run; wait for it, or name another file"
            ) from None
        except OSError:
            pass  # a file system without locks
        if os.fstat(file.fileno()).st_nlink:
            file.seek(0)
            return file
        file.close()  # Removed between opening and locking, by a run that was done.


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[str]]:
    """A text file that appears under its name when the body ends, whole, and not at all when it fails.

    Opened at once, so that a folder that cannot be written to is found before hours of work. Raises
    ConfigurationError for that. What a killed run has left of the same file is removed.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(replacing(Path(path)))
        except OSError as error:
            raise ConfigurationError(f"output {path}: cannot be written: {reason(error)}") from error
        stream = io.TextIOWrapper(file, encoding="utf-8")
        try:
            yield stream
        finally:
            stream.detach()
