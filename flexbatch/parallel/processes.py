"""The other ranks as processes that rank 0 starts on its own host, and watches."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from flexbatch.parallel.mesh import Mesh
from flexbatch.validation.errors import CRASH, told

logger = logging.getLogger("flexbatch")

GRACE = 10.0
"""Seconds in which rank 0 may end by itself once another rank has: it finds its connections closed, and cleans up."""
ENDING = 20.0
"""Seconds that ranks have for giving back what they hold."""
WHERE_IT_STANDS = signal.SIGUSR1
"""Has a rank write to stderr where each of its threads is."""
PACKAGE_ROOT = Path(__file__).parents[2]


class RankProcesses:
    """Ranks 1 and up of a mesh on one host. What they print goes to stderr."""

    def __init__(self, module: str, meshes: Sequence[Mesh], grace: float = GRACE) -> None:
        """module: has a ``main`` that takes the words of `mesh_words`. Ranks log everything where this process does,
        and warnings elsewhere."""
        self.grace, began = grace, time.perf_counter()
        code = (
            f"import faulthandler, os, sys; faulthandler.register({WHERE_IT_STANDS.value}); "
            f"sys.path.insert(0, {str(PACKAGE_ROOT)!r}); from {module} import main; code = main(); "
            # A GPU that waits for a rank that is gone keeps an interpreter from ending by itself.
            "sys.stderr.flush(); os._exit(code) if code else sys.exit()"
        )
        level = "DEBUG" if logger.isEnabledFor(logging.DEBUG) else "WARNING"
        self.closing, self.lost = threading.Event(), ""
        self.told = threading.Event()
        """Whether whoever uses the engine knows that a rank has ended."""
        self.processes: list[subprocess.Popen[bytes]] = []
        for mesh in meshes:
            words = [sys.executable, "-c", code, *mesh_words(mesh), level]
            # A rank ends when its stdin does: whatever ends rank 0 closes it.
            self.processes.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=2))
        for mesh, process in zip(meshes, self.processes, strict=True):
            threading.Thread(target=self._watch, args=(mesh.rank, process), daemon=True).start()
        told = ", ".join(f"{each.rank} (process {it.pid})" for each, it in zip(meshes, self.processes, strict=True))
        logger.debug("started rank %s in %.1f s", told, time.perf_counter() - began)

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self.closing.is_set() or self.lost:
            return
        if code < 0:
            self.lost = f"rank {rank} was killed by {signal.Signals(-code).name}; a host without memory does that"
        else:
            self.lost = f"rank {rank} ended with exit code {code}; its error is above"
        self.kill()
        if not self.told.wait(self.grace) and not self.closing.is_set():
            logger.error("%s; ending rank 0, too", self.lost)
            # Rank 0 waits for something else: a file, a request, a GPU that waits for the rank that is gone.
            sys.stderr.flush()
            os._exit(CRASH)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        """Waits for the ranks to end, which have been told to; those that do not are killed."""
        self.closing.set()
        for process in self.processes:
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()


def mesh_words(mesh: Mesh) -> list[str]:
    """A mesh as the words of a command, for `mesh_of_words`."""
    return [str(mesh.rank), str(mesh.size), mesh.address]


def mesh_of_words(words: Sequence[str]) -> Mesh:
    rank, size, address = words[:3]
    return Mesh(int(rank), int(size), address, int(rank), int(size), hosts_store=False)


def log_as_rank_0(words: Sequence[str]) -> None:
    """In a process of `RankProcesses`: its log, with the time and the rank."""
    rank, level = words[0], words[3]
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=f"%(asctime)s rank {rank}: %(message)s")
    logger.setLevel(level)


def live_as_long_as_rank_0() -> None:
    """In a process of `RankProcesses`: rank 0 alone is interrupted and ended by the user, and ends the others."""
    ignore_interruptions()

    def watch() -> None:
        os.read(0, 1)
        os._exit(CRASH)

    threading.Thread(target=watch, daemon=True).start()


def ignore_interruptions() -> None:
    """Rank 0 finishes what is in flight after Ctrl-C, and needs the other ranks for it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def log_error(rank: int, error: BaseException) -> None:
    """The error of a rank with its traceback."""
    logger.error("rank %d: %s", rank, told(error), exc_info=error)
