"""The child of this process that lists kernels and forks as many processes as are to compile them.

They share what was imported and what was listed, in time and in memory. Each takes the next kernel when it is done
with one, the longest first.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flexbatch.execution.forked import Forked, Say
from flexbatch.execution.left_out import leave_out
from flexbatch.kernels.imagined_gpu import Launch
from flexbatch.kernels.launchers_ahead import DriverOfTriton

INDEX_BYTES = 4
"""Of a kernel's number in the pipe that the forks take theirs from: each read takes one."""


def compilers_of(listed: Callable[[], list[Launch]], backend: str, processes: int) -> Forked:
    """listed: in the child, which kernels there are; backend: of Triton's compiler. Raises OSError where nothing can be
    forked."""
    return Forked(lambda say: compile_all(listed, backend, processes, say))


def compile_all(listed: Callable[[], list[Launch]], backend: str, processes: int, say: Say) -> None:
    """In the child. What it says are fields of `kernels_ahead.Compiled`: how many kernels there are, and once they are
    compiled, all."""
    begun = time.perf_counter()
    os.nice(5)
    torch.set_num_threads(1)
    leave_out()
    ready = time.perf_counter()
    told: dict[str, Any] = {"imports_seconds": ready - begun}
    try:
        launches = listed()
        listed_at = time.perf_counter()
        told |= {"count": len(launches), "listing_seconds": listed_at - ready}
        say(told)
        compile_in_forks([DriverOfTriton(backend), *launches], processes)
        told["compiling_seconds"] = time.perf_counter() - listed_at
    except Exception as failed:  # whatever it is, a job runs all the same
        told["error"] = f"{type(failed).__name__}: {failed}"[:300]
    took = os.times()
    told["processor_seconds"] = took.user + took.system + took.children_user + took.children_system
    say(told)


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
