"""A child of this process that does some work and says what comes of it, a line of JSON at a time.

It begins with all that this process has imported, in milliseconds: a process of its own took 7 s of a machine with a
GPU to import as much. What it shares it must leave alone. It uses no GPU, has no descriptor of this process but the one
that it answers through, collects no garbage that was there before, and ends without running anything of this process.
Pinned memory is not in it (`memory.tiers.HostArena`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import os
import selectors
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

Say = Callable[[dict[str, Any]], None]
ENDING = signal.SIGINT, signal.SIGTERM


class Forked:
    """The child, from outside."""

    def __init__(self, work: Callable[[Say], None]) -> None:
        """work: in the child, is given what says something. Raises OSError where none can be forked."""
        self.stream, answers = os.pipe()
        self.pid, self.rest, self.ended = 0, b"", False
        failed: list[OSError] = []
        # In a thread, where Python handles no signal: Ctrl-C between a fork and what comes of it would lose the child.
        thread = threading.Thread(target=self._fork, args=(work, answers, failed), name="flexbatch-fork")
        try:
            thread.start()
            thread.join()
        except RuntimeError as error:  # a limit of processes counts threads, too
            os.close(answers)
            failed.append(OSError(errno.EAGAIN, str(error)))
        except BaseException:
            thread.join()
            self.close()
            raise
        if failed:
            os.close(self.stream)
            raise failed[0]

    def _fork(self, work: Callable[[Say], None], answers: int, failed: list[OSError]) -> None:
        kept = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the child has handlers of its own
        try:
            self.pid = fork()
            if not self.pid:
                in_child(work, answers, kept)
        except OSError as error:
            failed.append(error)
        finally:
            os.close(answers)

    def said(self, seconds: float) -> dict[str, Any] | None:
        """The next thing, waited for so long; None where it says nothing."""
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.stream, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                if not selector.select(max(0.0, until - time.monotonic())):
                    return None
                part = os.read(self.stream, 1 << 16)
                if not part:
                    return None
                self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it, and what it has forked itself."""
        if self.ended:
            return
        self.ended = True
        if self.pid:
            self._end()
        os.close(self.stream)

    def _end(self) -> None:
        for end in (os.killpg, os.kill):  # it may not lead a group yet
            with contextlib.suppress(OSError):
                end(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def fork() -> int:
    with warnings.catch_warnings():  # other threads wait for work, and hold nothing that the child needs
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(work: Callable[[Say], None], answers: int, signals: Iterable[int]) -> NoReturn:
    try:
        os.setsid()  # Ctrl-C does not reach it
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        gc.freeze()
        gc.enable()  # whoever imports may have it off
        # Where this process has no stdin and stdout, pipes take their numbers.
        answers = fcntl.fcntl(answers, fcntl.F_DUPFD_CLOEXEC, 3)
        leave_descriptors(answers)
        work(lambda what: write_all(answers, json.dumps(what).encode() + b"\n"))
    finally:
        os._exit(0)


def leave_descriptors(kept: int) -> None:
    """It says nothing: of a full disk or what else goes wrong it is said where the work is needed. Locks, sockets and
    the far ends of pipes are this process's alone. kept: none of the standard three."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) != kept:
                with contextlib.suppress(OSError):
                    os.close(int(name))
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)  # they may have had others


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
