"""The process that compiles kernels for another one: it imports what that takes, is given work, and forks as many as
are to compile. Nothing here imports torch before it has to: a process that will need kernels starts it first of all,
and does its own imports meanwhile.

The forks share what was imported and what was listed, in time and in memory. Each takes the next kernel when it is done
with one, the longest first.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexbatch.parallel.processes import PACKAGE_ROOT

INDEX_BYTES = 4
"""Of a kernel's number in the pipe that the forks take theirs from: each read takes one."""


class KernelCompilers:
    """The process, from outside: it waits for work, and ends where there is none."""

    def __init__(self, module: str) -> None:
        """module: whose kernels it will be told of, imported in advance. Raises OSError."""
        code = f"import sys; sys.path.insert(0, {str(PACKAGE_ROOT)!r}); from {__name__} import main; main(sys.argv[1])"
        # Torch finds no GPU then, and takes nothing of it; and no library has a thread of its own when it forks.
        alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # It says nothing: of Ctrl-C, which does not reach it, or a full disk it is said where kernels are launched.
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | alone,
            start_new_session=True,
        )
        self.files: list[Path] = []

    def give(self, work: Any) -> None:
        """Plain data, of ``module``'s kernels: what is announced, of which GPU, and how many processes compile it."""
        descriptor, name = tempfile.mkstemp(prefix="flexbatch-kernels-")
        self.files.append(Path(name))
        with open(descriptor, "wb") as file:
            pickle.dump(work, file)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which `told` finds
            self.process.stdin.write(f"{name}\n".encode())
            self.process.stdin.flush()

    def told(self, seconds: float) -> dict[str, Any] | None:
        """What it did, waited for so long; None where it does not say."""
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError, OSError):
            said, _ = self.process.communicate(timeout=max(0.0, seconds))
            found = json.loads(said)
            return found if self.process.returncode == 0 and isinstance(found, dict) else None
        return None

    def close(self) -> None:
        """End it, and those that compile."""
        if self.process.returncode is None:  # of one that has ended the number may be another one's
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        for file in self.files:
            file.unlink(missing_ok=True)


def main(module: str) -> None:
    """In the process. What it says is JSON: the fields of `kernels_ahead.Compiled`."""
    begun = time.perf_counter()
    os.nice(5)
    import torch

    from flexbatch.execution import kernels_ahead
    from flexbatch.kernels.launchers_ahead import DriverOfTriton

    importlib.import_module(module)
    with contextlib.suppress(ImportError):  # the first use of tensors without memory does, which took 0.5 of 0.6 s
        importlib.import_module("torch.fx.experimental.symbolic_shapes")
    torch.set_num_threads(1)
    ready = time.perf_counter()
    name = sys.stdin.readline().strip()
    if not name:
        return
    given, count, error = time.perf_counter(), 0, ""
    listed = given
    try:
        announced, traits, processes = pickle.loads(Path(name).read_bytes())
        launches = kernels_ahead.listed(announced, traits)
        listed = time.perf_counter()
        count = len(launches)
        compile_in_forks([DriverOfTriton(traits.backend), *launches], processes)
    except Exception as failed:  # whatever it is, a job runs all the same
        error = f"{type(failed).__name__}: {failed}"[:300]
    took = os.times()
    told = {
        "count": count,
        "processor_seconds": took.user + took.system + took.children_user + took.children_system,
        "error": error,
        "imports_seconds": ready - begun,
        "listing_seconds": listed - given,
        "compiling_seconds": time.perf_counter() - listed,
    }
    print(json.dumps(told), flush=True)


def compile_in_forks(launches: Sequence[Any], processes: int) -> None:
    """launches: have a ``compile``. Where no process can be forked, this one does it. Raises ChildProcessError where
    one was ended: what it was at is not compiled."""
    order = sorted(range(len(launches)), key=lambda index: launches[index].weight, reverse=True)
    taken, given = os.pipe()
    forks = []
    for _ in range(min(processes, len(order))):
        try:
            fork = os.fork()
        except OSError:
            break
        if not fork:
            try:
                os.close(given)
                compile_those(launches, taken)
            finally:
                os._exit(0)
        forks.append(fork)
    if not forks:
        for index in order:
            compile_one(launches[index])
        order = []
    with open(given, "wb") as pipe:
        for index in order:
            pipe.write(index.to_bytes(INDEX_BYTES, "little"))
            pipe.flush()
    ended = [os.waitpid(fork, 0)[1] for fork in forks]
    os.close(taken)
    if lost := sum(status != 0 for status in ended):
        raise ChildProcessError(f"{lost} of {len(forks)} processes were ended; a host without memory does that")


def compile_those(launches: Sequence[Any], taken: int) -> None:
    """In a fork: those whose numbers it takes, until none is left."""
    while index := os.read(taken, INDEX_BYTES):
        compile_one(launches[int.from_bytes(index, "little")])


def compile_one(launch: Any) -> None:
    # One that cannot be compiled says so where it is launched, if it ever is.
    with contextlib.suppress(Exception):
        launch.compile()
