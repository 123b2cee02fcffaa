"""Commands as processes of their own that begin with torch, transformers and the package loaded.

Importing them takes a command five seconds of one core. A helper imports them once for a process of pytest and forks
for each start; what a command does at import, and how its interpreter ends, is the subject of
`tests/cli/test_stdout.py` and `tests/packaging`, which start real ones.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "torch", "transformers.models.llama", "flexbatch.run", "flexbatch.engine", "flexbatch.apps.batch",
    "flexbatch.calibrate.machine", "pandas", "pyarrow.dataset", "pyarrow.parquet", "tests.apps_batch.driver",
    "flexbatch.apps.serve.process", "uvicorn",
)  # fmt: skip


class Forked:
    """A module that runs as ``python -m`` would run it, with the part of the interface of ``subprocess.Popen`` that
    tests use; output is text."""

    def __init__(self, module: str, words: Sequence[str], environ: dict[str, str] | None = None) -> None:
        self._helper = _helper()
        self._files = [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]  # noqa: SIM115
        paths = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self._files]
        self.pid = self._helper.start([module, *words], {**os.environ, **(environ or {})}, paths)

    @property
    def returncode(self) -> int | None:
        return self._helper.exit_codes.get(self.pid)

    def poll(self) -> int | None:
        self._helper.read()
        return self.returncode

    def wait(self, timeout: float = 600.0) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float = 600.0) -> tuple[str, str]:
        """Waits for the end; returns what the process wrote to stdout and stderr."""
        self.wait(timeout)
        for file in self._files:
            file.seek(0)
        return self._files[0].read(), self._files[1].read()

    def said(self) -> str:
        """What the process has written to stderr so far."""
        return Path(f"/proc/{os.getpid()}/fd/{self._files[1].fileno()}").read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Helper:
    """The process that has imported everything, as its parent sees it."""

    def __init__(self) -> None:
        # Hashes are not those of this process, so that results that depend on them differ.
        environ = {
            **os.environ,
            "PYTHONHASHSEED": "7",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"], cwd=ROOT, env=environ, stdin=-1, stdout=-1, text=True, bufsize=1
        )
        self.exit_codes: dict[int, int] = {}
        atexit.register(self.close)

    def close(self) -> None:
        """Ends the helper; what it has forked goes on."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def start(self, words: list[str], environ: dict[str, str], outputs: list[str]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([words, environ, outputs]) + "\n")
        while (found := self._next()).keys() != {"pid"}:
            self.exit_codes |= {found["ended"]: found["code"]}
        self.exit_codes.pop(found["pid"], None)
        return found["pid"]

    def read(self) -> None:
        """Takes what has ended meanwhile. A line is written whole, and nothing is buffered behind it."""
        assert self.process.stdout is not None
        while select.select([self.process.stdout], [], [], 0)[0]:
            found = self._next()
            self.exit_codes |= {found["ended"]: found["code"]}

    def _next(self) -> dict[str, int]:
        # Byte by byte: `select` does not see what a buffer of Python holds.
        assert self.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, "the helper that forks processes has ended"
            line += byte
        return json.loads(line)


@functools.cache
def _helper() -> _Helper:
    return _Helper()


def run(words: list[str], environ: dict[str, str], outputs: list[str]) -> int:
    """The life of a forked process up to its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environ)
    for number, path in ((0, os.devnull), *enumerate(outputs, 1)):
        descriptor = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv, sys.orig_argv = list(words), [sys.executable, "-m", *words]
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code: Any = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def serve() -> None:
    """Forks a process for every line of stdin, until that is closed; tells its parent their ids and exit codes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies, running = os.dup(1), set()
    os.dup2(2, 1)
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # an environment without some extra starts what it has
            importlib.import_module(name)
    gc.collect()
    gc.freeze()

    def reply(**values: int) -> None:
        os.write(replies, (json.dumps(values) + "\n").encode())

    requests = io.FileIO(0, closefd=False)
    while True:
        if select.select([requests], [], [], 0.01 if running else None)[0]:
            if not (line := requests.readline()):
                os._exit(0)
            if not (pid := os.fork()):
                os.close(replies)
                os._exit(run(*json.loads(line)) & 0xFF)
            running.add(pid)
            reply(pid=pid)
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            running.remove(ended[0])
            reply(ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))


if __name__ == "__main__":
    serve()
