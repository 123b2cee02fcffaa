"""Data on stdout and nothing else: what libraries print there, in Python or in C, at import or at exit, goes to stderr.

Two layers. `run_process` moves file descriptor 1 of a command's process to stderr for good, so that nothing that a
library does until the very end reaches the data. `data_apart` keeps `sys.stdout` from libraries while a command
works, and hands the stream for data to it; called in a program's own process, it puts everything back.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

COLLECTED_OBJECTS = 50_000
"""New objects after which Python looks for garbage in cycles, in the processes of commands. By default it does after
700 (2,000 from 3.13 on): a quarter of the processor time of importing torch and transformers was that."""
READER_GONE = 1
"""Exit code where data could not be written, as whoever read it has gone."""


def run_process(main: Callable[[], int | None]) -> int:
    """Runs the main function of a process, whose `sys.stdout` is then a stream of its own, and returns its exit code.

    A reader that has gone (``| head``) ends the process without a traceback, and so does Ctrl-C where nobody handles
    it: while modules are imported, and once ``main`` has returned. Where stdout is moved already, or is no file,
    ``main`` just runs.
    """
    gc.set_threshold(COLLECTED_OBJECTS, *gc.get_threshold()[1:])
    try:
        code = _run_with_own_stdout(main)
        _ignore_interrupts()
    except KeyboardInterrupt:
        _ignore_interrupts()
        code = 128 + signal.SIGINT
    return code


def _ignore_interrupts() -> None:
    """The exit code stands and all is written: a second Ctrl-C that comes now would only interrupt the interpreter,
    which takes its libraries down for up to a second and prints a traceback for each that it is kept from."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def _run_with_own_stdout(main: Callable[[], int | None]) -> int:
    _open_standard_streams()
    if _descriptor(sys.stdout) != 1:
        return main() or 0
    sys.stdout.flush()
    data = _text_stream(os.dup(1), sys.stdout)
    os.dup2(2, 1)
    sys.stdout = data
    try:
        code = main() or 0
    except BrokenPipeError:
        code = READER_GONE
    except SystemExit as end:  # of argparse, after --help
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else READER_GONE
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    finally:
        sys.stdout = sys.stderr
        failure = _close(data)
    if failure is None or code:
        return code
    if not isinstance(failure, BrokenPipeError):
        print(f"stdout: {failure.strerror}", file=sys.stderr)
    return READER_GONE


@contextlib.contextmanager
def data_apart() -> Iterator[TextIO]:
    """The stream for data. Meanwhile `sys.stdout` and file descriptor 1, which processes that are started inherit,
    are stderr."""
    given = sys.stdout
    given.flush()
    kept = os.dup(1)
    data = _text_stream(os.dup(kept), given) if _descriptor(given) == 1 else given
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield data
        data.flush()
    finally:
        sys.stdout = given
        # What C has in its buffers would otherwise follow when stdout is stdout again.
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        if data is not given:
            _close(data)


def _open_standard_streams() -> None:
    """A process may be started without them (``>&-``): the next file that is opened would take their numbers, and
    get what libraries print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    sys.stdout = sys.stdout or _text_stream(os.dup(1), None)
    if sys.stderr is None or _descriptor(sys.stderr) == 2:
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Messages(2, "wb", closefd=False)), encoding, "backslashreplace", line_buffering=True
        )


class _Messages(io.FileIO):
    """File descriptor 2. What cannot be written there is lost and nothing else is: a terminal that was closed, a reader
    that has gone or a full disk ends no job, and changes no exit code."""

    name = "<stderr>"

    def write(self, data: Any, /) -> int:
        written: int | None = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _text_stream(descriptor: int, like: TextIO | None) -> TextIO:
    """A stream with the encoding of another. Half a surrogate pair, which no encoding has, is written as JSON writes
    it."""
    encoding = getattr(like, "encoding", None) or "utf-8"
    return io.TextIOWrapper(
        open(descriptor, "wb"), encoding=encoding, errors="backslashreplace", line_buffering=os.isatty(descriptor)
    )


def _close(stream: TextIO) -> OSError | None:
    """Close; why what was left could not be written: its reader has gone, say, or the disk is full."""
    try:
        stream.close()
    except OSError as error:
        return error
    return None
