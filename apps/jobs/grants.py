"""Who may write to an output folder: one lock, and a grant with a number for every writer.

A grant is a file ``writer-{term}-{k}-of-{n}`` of the state folder. Its term is a fencing token: one more than any
before, created only if nobody has it. Its owner holds a lock on it while it lives; whoever finds the lock free may take
the shard over, with a grant of its own, and removes the old one. A process that was thought dead (a machine that was
suspended, a lock that its network file system lost) finds its grant gone before it commits anything more, and stops.

Grants are given, taken back and looked at before a commit under one lock, ``lock``, that nobody holds for longer than
that: looking at two locks, one after the other, would let two processes each see the other's free.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from flexbatch.files.atomic import sync_folder
from flexbatch.validation.errors import ConfigurationError

LOCK_FILE = "lock"
LOCK_WAIT_S = 60.0
GRANT = re.compile(r"writer-(\d+)-(\d+)-of-(\d+)")


class TakenOver(RuntimeError):
    """Another process has taken over the shard of this one. What this one had committed stays."""


@contextlib.contextmanager
def writers_lock(state: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Lets in one process at a time. Raises OSError where the lock stays taken for ``wait_s`` seconds, or there are
    no locks."""
    path, end = state / LOCK_FILE, time.monotonic() + wait_s
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise OSError(
                        errno.EAGAIN, f"another process has held the lock for {wait_s:g} s; is one stopped?", str(path)
                    ) from None
                time.sleep(0.002)
        yield
    finally:
        os.close(descriptor)


def grants(state: Path) -> list[tuple[int, int, int, Path]]:
    """Returns (term, k, n, path) of every grant, oldest first."""
    found = ((GRANT.fullmatch(name), name) for name in os.listdir(state))
    return sorted((int(match[1]), int(match[2]), int(match[3]), state / name) for match, name in found if match)


def _conflict(shard: tuple[int, int], other: tuple[int, int]) -> bool:
    """Returns whether two shards must not write at the same time: shards of different counts have parts in common,
    so only shards of the same count may."""
    return shard[1] != other[1] or shard[0] == other[0]


def _describe(path: Path) -> str:
    """Returns ``shard 0-of-2 (process 17 on node3, since ...)`` as far as the grant can be read."""
    match = GRANT.fullmatch(path.name)
    name = f"shard {match[2]}-of-{match[3]}" if match else path.name
    try:
        owner = json.loads(path.read_text())
        return f"{name} (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return name


def refuse_other_writers(state: Path, shard: tuple[int, int]) -> None:
    """Called under the lock. Raises ConfigurationError while a living process writes what this shard would."""
    for _, k, n, path in grants(state):
        if not _conflict(shard, (k, n)):
            continue
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigurationError(
                    f"output {state.parent} is being written by another process, as {_describe(path)}"
                ) from None


class Grant:
    """The right of this process to write one shard, or of a worker to write in the name of such a process.

    `check` raises TakenOver once somebody else was given the shard. Under the lock its answer holds until the
    lock is free.
    """

    def __init__(self, path: Path, descriptor: int = -1) -> None:
        match = GRANT.fullmatch(path.name)
        assert match is not None, f"{path} is no grant"
        self.path, self._descriptor = path, descriptor
        self.term, self.shard = int(match[1]), (int(match[2]), int(match[3]))

    @classmethod
    def take(cls, state: Path, shard: tuple[int, int]) -> Grant:
        """Called under the lock, after `refuse_other_writers`. The grants that this one replaces are gone then."""
        before = grants(state)
        term = before[-1][0] if before else 0
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        while True:
            term += 1
            path = state / f"writer-{term:08d}-{shard[0]}-of-{shard[1]}"
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                break
            except FileExistsError:
                continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, json.dumps(owner).encode())
            os.fsync(descriptor)
            sync_folder(state)  # before the old grants go, so that terms never begin anew
            for _, k, n, old in before:
                if _conflict(shard, (k, n)):
                    old.unlink(missing_ok=True)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return cls(path, descriptor)

    def check(self) -> None:
        if self.path.exists():
            return
        others = grants(self.path.parent)
        newer = [path for term, k, n, path in others if term > self.term and _conflict(self.shard, (k, n))]
        by = f"now {_describe(newer[-1])}" if newer else "whose grant is gone too"
        raise TakenOver(
            f"output {self.path.parent.parent} was taken over by another process, {by}. "
            "This one stops; what it had finished is kept"
        )

    def release(self) -> None:
        """Lets others take the shard. The file stays: the terms go on from it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
