"""How ranks find each other: in short steps, between which signals are handled and the log says who is missing. Torch
waits for a store, and for all members of a group, in code that neither Ctrl-C nor SIGTERM ends."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store

from flexbatch.parallel.mesh import Mesh
from flexbatch.validation.errors import LostRankError

logger = logging.getLogger("flexbatch")

MEETING = timedelta(minutes=5)
"""Within which all ranks have to come to the store: hosts of a cluster start minutes apart."""
STEP_SECONDS = 0.02
FIRST_TOLD_SECONDS, TOLD_SECONDS = 3.0, 15.0
"""Until the log says that somebody is waited for, and between two such lines: the ranks of one host come within the
seconds that it takes to import torch."""
CONNECTING_SECONDS = 2.0


def wait_until_there(missing: Callable[[], str], rank: str, seconds: float | None = None) -> None:
    """Wait while somebody is missing: ``missing`` says who, empty where nobody is. rank: who waits. Raises
    LostRankError after ``seconds``, 5 minutes by default."""
    limit = MEETING.total_seconds() if seconds is None else seconds
    began = time.monotonic()
    told = began + FIRST_TOLD_SECONDS
    while who := missing():
        now = time.monotonic()
        if now - began > limit:
            raise LostRankError(f"{rank} waited {limit:.3g} s for {who}")
        if now > told:
            logger.info("%s waits for %s, for %.0f s so far", rank, who, now - began)
            told = now + TOLD_SECONDS
        time.sleep(STEP_SECONDS)


def wait_for_store(mesh: Mesh, seconds: float | None = None) -> None:
    """Until the rank that hosts the store takes connections. Raises LostRankError."""

    def missing() -> str:
        try:
            socket.create_connection(mesh.host_and_port, CONNECTING_SECONDS).close()
        except OSError as error:
            return f"the store of all ranks at MASTER_ADDR:MASTER_PORT, {mesh.address} ({error.strerror or error})"
        return ""

    wait_until_there(missing, f"rank {mesh.rank}", seconds)


def wait_for_members(store: Store, name: str, rank: int, size: int, seconds: float | None = None) -> None:
    """Until all ``size`` members of a group have come here. rank: of this one among them. Raises LostRankError."""
    own = PrefixStore(f"{name} members", store)
    absent = [k for k in range(size) if k != rank]

    def missing() -> str:
        absent[:] = [k for k in absent if not own.check([str(k)])]
        return f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))} of {size} ({name})" if absent else ""

    try:
        own.set(str(rank), "here")
        wait_until_there(missing, f"rank {rank}", seconds)
    except LostRankError:
        raise
    except RuntimeError as error:
        raise LostRankError(f"rank {rank} of {size} ({name}) waited for the others: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
