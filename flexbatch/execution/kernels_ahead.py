"""Triton's kernels, compiled in processes before they are launched: half a second to 5 s each, in the middle of a job.

The processes need no GPU, and take none of its memory (`kernels.imagined_gpu`). They are forked, and have all that this
one has imported: what is compiled is there 7 s earlier than from processes that import it themselves. They hand their
work on by Triton's cache on the disk, where every later start finds it. Threads would not do: the compiler holds the
interpreter's lock, and whoever lists kernels must be the only one who uses torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import torch

from flexbatch.execution.forked import Forked
from flexbatch.execution.kernel_compilers import compilers_of
from flexbatch.kernels.imagined_gpu import GpuTraits, Launch, imagined_gpu
from flexbatch.kernels.threads import usable_processors
from flexbatch.parallel.processes import PACKAGE_ROOT
from flexbatch.policy.units import duration_text

logger = logging.getLogger("flexbatch")

LEAST_PROCESSES, MOST_PROCESSES = 2, 16
"""One alone would have a job wait longer for all kernels that it may launch than for those that it does."""
PROCESS_BYTES = 512 * 2**20
"""Of host memory, in each."""
LIMIT_SECONDS = 60.0
"""After the body. What is not compiled by then is where it is launched."""
LISTING_SECONDS = 20.0
"""After the body, until it is known what there is: a second is usual."""
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
    """Kernels that were looked at, the seconds that nothing else was done meanwhile, and those of all processors."""

    count: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    error: str = ""
    """Of a process that could not tell which kernels there are."""
    imports_seconds: float = 0.0
    listing_seconds: float = 0.0
    compiling_seconds: float = 0.0
    """Of the process that forks the others, by the clock: what it imports, which kernels there are, and until the last
    of them was compiled."""

    def __add__(self, other: Compiled) -> Compiled:
        counts = (each.name for each in fields(Compiled) if each.name != "error")
        added = {name: getattr(self, name) + getattr(other, name) for name in counts}
        return Compiled(**added, error=other.error or self.error)


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
    with contextlib.ExitStack() as stack:
        marker = marker_of(device, announced) if device.type == "cuda" else None
        count = process_count(sharers, free_bytes)
        if marker is None or marker.exists() or count < LEAST_PROCESSES:
            yield
            return
        if (lock := locked(marker)) is None:
            yield
            wait_for(marker)
            return
        stack.enter_context(lock)
        traits = GpuTraits.of(device)
        try:
            compilers = compilers_of(lambda: listed(announced, traits), traits.backend, count)
        except OSError:  # no process can be forked
            yield
            return
        stack.callback(compilers.close)
        logger.info("compiling kernels in %d processes, where they are not compiled already", count)
        yield
        compiled, whole = finished(compilers)
        if compiled.count and compiled.seconds > SAID_SECONDS:
            told = compiled.count, duration_text(compiled.seconds)
            logger.info("compiled %d kernels ahead, and waited %s for the last of them", *told)
        note(compiled)
        if whole:
            with contextlib.suppress(OSError):
                marker.touch()


def process_count(sharers: int = 1, free_bytes: float = math.inf) -> int:
    """That compile; see `compiled_ahead`."""
    cores, held = usable_processors() // sharers - 1, free_bytes // (sharers * PROCESS_BYTES)
    return int(min(MOST_PROCESSES, cores, held))


def finished(compilers: Forked) -> tuple[Compiled, bool]:
    """What they did, once they are done or the time is up; and whether that is all of it."""
    begun = time.perf_counter()
    told = compilers.said(LISTING_SECONDS)
    if told is not None and "processor_seconds" not in told:
        told = compilers.said(LIMIT_SECONDS)
    found = Compiled(**(told or {}))
    if found.error:
        logger.info("kernels are compiled where they are first launched: %s", found.error)
    return replace(found, seconds=time.perf_counter() - begun), told is not None and not found.error


def listed(announced: Announced, traits: GpuTraits) -> list[Launch]:
    """In the child: the kernels that are launched."""
    with imagined_gpu(traits) as found:
        announced.launch(announced.what)
    return list(found)


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
