"""Triton's kernels, compiled in processes before they are launched: half a second to 5 s each, in the middle of a job.

The processes need no GPU, and take none of its memory (`kernels.imagined_gpu`). Each lists the kernels by itself and
compiles its share; they hand their work on by Triton's cache on the disk, where every later start finds it. Threads
would not do: the compiler holds the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from flexbatch.kernels.imagined_gpu import GpuTraits, Launch, imagined_gpu
from flexbatch.parallel.processes import PACKAGE_ROOT
from flexbatch.policy.units import duration_text

logger = logging.getLogger("flexbatch")

LEAST_PROCESSES, MOST_PROCESSES = 2, 8
"""Each takes 3 s to begin. One alone would have a job wait longer for all kernels that it may launch than for those
that it does."""
PROCESS_BYTES = 512 * 2**20
"""Of host memory, in each."""
LIMIT_SECONDS = 60.0
"""After the body. What is not compiled by then is where it is launched."""
SAID_SECONDS = 1.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Announced:
    """Kernels that may be launched: all that ``launch`` does for ``what``. launch: of a module; what: plain data, equal
    where its `repr` is."""

    launch: Callable[[Any], None]
    what: Any

    def __str__(self) -> str:
        return f"{self.launch.__module__}.{self.launch.__qualname__} {self.what!r}"


@dataclass(frozen=True)
class Compiled:
    """Kernels that were looked at, the seconds that nothing else was done meanwhile, and those of all processes."""

    count: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    error: str = ""
    """Of a process that could not tell which kernels there are."""

    def __add__(self, other: Compiled) -> Compiled:
        processor_seconds = self.processor_seconds + other.processor_seconds
        count, seconds = self.count + other.count, self.seconds + other.seconds
        return Compiled(count, seconds, processor_seconds, other.error or self.error)


@contextlib.contextmanager
def compiled_ahead(
    device: torch.device,
    announced: Announced,
    note: Callable[[Compiled], None] = lambda compiled: None,
    sharers: int = 1,
    free_bytes: float = math.inf,
) -> Iterator[None]:
    """Others compile what is ``announced`` while the body runs, and are waited for at its end. What they do not
    get done is compiled where it is launched. Where all of it was compiled before, and where there is no GPU, nothing
    happens. note: is told what was done. sharers: processes that share the host, this one among them; free_bytes: of
    its memory that they and the body leave."""
    marker = marker_of(device, announced) if device.type == "cuda" else None
    cores, held = len(os.sched_getaffinity(0)) // sharers - 1, free_bytes // (sharers * PROCESS_BYTES)
    count = int(min(MOST_PROCESSES, cores, held))
    if marker is None or marker.exists() or count < LEAST_PROCESSES:
        yield
        return
    with contextlib.ExitStack() as stack:
        if (lock := locked(marker)) is None:
            yield
            wait_for(marker)
            return
        stack.enter_context(lock)
        work = stack.enter_context(tempfile.NamedTemporaryFile(prefix="flexbatch-kernels-"))
        work.write(pickle.dumps((announced, GpuTraits.of(device), count)))
        work.flush()
        workers = stack.enter_context(started(work.name, count))
        logger.info("compiling kernels in %d processes, where they are not compiled already", len(workers))
        yield
        compiled = finished(workers)
        if compiled.count and compiled.seconds > SAID_SECONDS:
            told = compiled.count, duration_text(compiled.seconds)
            logger.info("compiled %d kernels before the first pass, which waited %s for them", *told)
        note(compiled)
        if len(workers) == count and not compiled.error and all(worker.returncode == 0 for worker in workers):
            with contextlib.suppress(OSError):
                marker.touch()


@contextlib.contextmanager
def started(work: str, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """As many processes as can be started. They are ended with the body."""
    code = (
        # Torch finds no GPU then, and nothing of it is taken.
        "import os, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''; "
        f"sys.path.insert(0, {str(PACKAGE_ROOT)!r}); from {__name__} import compile_part; "
        "compile_part(sys.argv[1], int(sys.argv[2]))"
    )
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with contextlib.suppress(OSError):
            for part in range(count):
                # They say nothing: of Ctrl-C or a full disk it is said where kernels are launched, and once.
                command, silent = [sys.executable, "-c", code, work, str(part)], subprocess.DEVNULL
                workers.append(subprocess.Popen(command, stdin=silent, stdout=subprocess.PIPE, stderr=silent))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()


def finished(workers: list[subprocess.Popen[bytes]]) -> Compiled:
    """What all of them did, once they are done or the time is up."""
    begun, until, found = time.perf_counter(), time.monotonic() + LIMIT_SECONDS, Compiled()
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
            told, _ = worker.communicate(timeout=max(0.0, until - time.monotonic()))
            found += Compiled(**json.loads(told))
    if found.error:
        logger.info("kernels are compiled where they are first launched: %s", found.error)
    return replace(found, seconds=time.perf_counter() - begun)


def compile_part(work: str, part: int) -> None:
    """In one of the processes, which says what it did as JSON."""
    os.nice(5)
    torch.set_num_threads(1)
    begun, mine, error = time.perf_counter(), list[Launch](), ""
    try:
        announced, traits, parts = pickle.loads(Path(work).read_bytes())
        with imagined_gpu(traits) as found:
            announced.launch(announced.what)
        mine = list(found)[part::parts]
    except Exception as failed:  # whatever it is, a job runs all the same
        error = f"{type(failed).__name__}: {failed}"[:300]
    for launch in mine:
        # One that cannot be compiled says so where it is launched, if it ever is.
        with contextlib.suppress(Exception):
            launch.compile()
    told = Compiled(len(mine), processor_seconds=time.perf_counter() - begun, error=error)
    print(json.dumps(asdict(told)), flush=True)


def marker_of(device: torch.device, announced: Announced) -> Path | None:
    """The file beside the compiled kernels that says that these were. None where Triton is not there, or too old to say
    where its cache is."""
    try:
        from triton import __version__, knobs
    except ImportError:
        return None
    told = hashlib.sha256(f"{__version__} {torch.__version__} {GpuTraits.of(device)} {announced}".encode())
    for folder in ("kernels", "models", "execution", "memory"):
        for path in sorted((PACKAGE_ROOT / "flexbatch" / folder).glob("*.py")):
            told.update(path.read_bytes())
    cache = Path(knobs.cache.dir)
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    return cache / f"flexbatch-compiled-{told.hexdigest()[:32]}"


def lock_path(marker: Path) -> Path:
    return marker.with_name(f"{marker.name}.lock")


def locked(marker: Path) -> IO[bytes] | None:
    """So that of several processes one compiles what all of them need; None where another one does. A folder that
    nobody can write to locks nothing."""
    try:
        lock = lock_path(marker).open("ab")
    except OSError:
        return Path(os.devnull).open("rb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def wait_for(marker: Path) -> None:
    """Until the process that compiles is done, or gone."""
    until = time.monotonic() + LIMIT_SECONDS
    while not marker.exists() and time.monotonic() < until:
        if (lock := locked(marker)) is not None:
            lock.close()
            return
        time.sleep(POLL_SECONDS)
