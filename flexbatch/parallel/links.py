"""Connections between rank 0 and the other engines of a job: messages of plain objects, in order, both ways.

A rendezvous by torch's store, authenticated connections by the standard library. Whoever is connected has the key,
which the store holds for the ranks of the job.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from torch.distributed import Store

from flexbatch.parallel.meeting import MEETING, first_line, wait_until_there
from flexbatch.parallel.mesh import Mesh
from flexbatch.validation.errors import LostRankError

ADDRESS = "data parallel"
"""Under which the store has the port and the key of rank 0."""
LOCAL = "127.0.0.1"


class Link:
    """One connection. Several threads may send, one receives."""

    def __init__(self, connection: Connection, peer: str) -> None:
        """peer: who is at the other end, for messages."""
        self._connection, self.peer = connection, peer
        self._lock = threading.Lock()
        with socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as same:
            # A small message behind another one would wait up to 40 ms for the first one's acknowledgement.
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, message: Any) -> None:
        """Raises LostRankError."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError as error:
            raise LostRankError(f"{self.peer} is gone: {first_line(error)}") from error

    def receive(self) -> Any:
        """Waits for a message. Raises LostRankError."""
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise LostRankError(f"{self.peer} is gone: {first_line(error)}") from error

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class EngineGroup:
    """Engines that share a line of requests: so many on this host, and on rank 0 the way to the others, None where they
    are still to be started."""

    local_engines: int
    links: Mapping[int, Link] | None = None


ONE_ENGINE = EngineGroup(1)


def link_engines(
    mesh: Mesh, store: Store, engines: list[int], lost: Callable[[], str] = lambda: "", seconds: float | None = None
) -> dict[int, Link]:
    """On rank 0: the connections of the other engines, by the number of each. lost: says who has ended meanwhile, empty
    where nobody has. Raises LostRankError."""
    key = secrets.token_bytes(32)
    end = time.monotonic() + (MEETING.total_seconds() if seconds is None else seconds)
    alone = mesh.local_size == mesh.size
    arrived: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    done = threading.Event()
    with Listener((LOCAL if alone else "", 0), backlog=len(engines), authkey=key) as listener:

        def accept() -> None:
            while not done.is_set():
                # Strangers who connect and go, or have no key, are no reason to stop; a closed listener is.
                with contextlib.suppress(AuthenticationError, EOFError, OSError):
                    arrived.put(listener.accept())

        threading.Thread(target=accept, name="engines", daemon=True).start()
        store.set(ADDRESS, f"{listener.address[1]} {key.hex()}")
        try:
            return come_in(arrived, engines, lost, end)
        finally:
            done.set()


def come_in(
    arrived: queue.SimpleQueue[Connection], engines: list[int], lost: Callable[[], str], end: float
) -> dict[int, Link]:
    """The connections of all engines, which tell their numbers. Raises LostRankError."""
    found: dict[int, Link] = {}
    while len(found) < len(engines):
        try:
            connection = arrived.get(timeout=0.1)
        except queue.Empty:
            if said := lost():
                raise LostRankError(said) from None
            if time.monotonic() > end:
                missing = ", ".join(str(each) for each in engines if each not in found)
                raise LostRankError(f"engines {missing} did not come to rank 0 in time") from None
            continue
        engine = connection.recv()
        found[engine] = Link(connection, f"engine {engine}")
    return found


def link_to_rank_0(mesh: Mesh, store: Store, engine: int) -> Link:
    """On another engine. Raises LostRankError."""
    store.set_timeout(MEETING)
    try:
        wait_until_there(lambda: "" if store.check([ADDRESS]) else "rank 0", f"engine {engine}")
        port, key = store.get(ADDRESS).decode().split()
        host = LOCAL if mesh.local_size == mesh.size else mesh.host_and_port[0]
        connection = Client((host, int(port)), authkey=bytes.fromhex(key))
        connection.send(engine)
    except (RuntimeError, OSError, EOFError) as error:
        raise LostRankError(f"engine {engine} does not find rank 0: {first_line(error)}") from error
    return Link(connection, "rank 0")
