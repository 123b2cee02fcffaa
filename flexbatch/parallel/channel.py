"""Groups of ranks, as objects that are passed on: torch's default process group, which is a global, is left alone."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore

from flexbatch.parallel.meeting import MEETING, first_line, wait_for_members, wait_for_store
from flexbatch.parallel.mesh import Mesh
from flexbatch.validation.errors import LostRankError

logger = logging.getLogger("flexbatch")

Group = Any
"""torch's ProcessGroupGloo or ProcessGroupNCCL. Their stubs have no common type with the collectives."""
ABORTING = 5.0
"""Seconds that giving up groups of GPUs may take. What they wait for is given up at once; an abort returns when no
graph has any of their sums recorded any more, and whoever has graphs may be waiting for the GPU until then."""
IDLE = timedelta(days=365)
"""An engine may wait for requests as long as it likes. A rank that has died is noticed by its closed connection."""
TOLD_BYTES = 4096
"""Of the error of a rank, in its answer; its log has all of it."""


def open_store(mesh: Mesh) -> TCPStore:
    """Waits for nobody but the rank that hosts it. Raises LostRankError."""
    host, port = mesh.host_and_port
    if not mesh.hosts_store:
        wait_for_store(mesh)
    try:
        return TCPStore(host, port, None, mesh.hosts_store, MEETING, wait_for_workers=False)
    except RuntimeError as error:
        raise LostRankError(f"rank {mesh.rank} finds no store at {mesh.address}: {first_line(error)}") from error


def gloo_group(store: Store, name: str, rank: int, size: int) -> Group:
    """A group over the network of the host, for tensors in host memory. rank: of this process among the ``size`` that
    make it together. Raises LostRankError."""
    store.set_timeout(MEETING)
    wait_for_members(store, name, rank, size)
    try:
        return ProcessGroupGloo(PrefixStore(name, store), rank, size, IDLE)
    except RuntimeError as error:
        raise LostRankError(f"rank {rank} of {size} ({name}) waited for the others: {first_line(error)}") from error


def device_group(store: Store, name: str, rank: int, size: int, device: torch.device) -> Group:
    """A group for tensors of the compute device: NCCL on GPUs, Gloo on CPUs."""
    if device.type != "cuda":
        return gloo_group(store, name, rank, size)
    from torch.distributed import ProcessGroupNCCL

    torch.cuda.set_device(device)
    store.set_timeout(MEETING)
    wait_for_members(store, name, rank, size)
    return ProcessGroupNCCL(PrefixStore(name, store), rank, size, ProcessGroupNCCL.Options())


class RankChannel:
    """What rank 0 tells the others, in order, as plain data; and whether they could do it."""

    def __init__(self, mesh: Mesh, store: Store) -> None:
        """Meets the other ranks. Raises LostRankError."""
        self.mesh, self.store = mesh, store
        self.groups: dict[str, Group] = {}
        """Those of the compute device, by name: later engines have them, too. All ranks make the same ones."""
        self.broken = False
        """Whether a pass failed on this rank in its middle, where the other ranks wait for it in vain."""
        self.group = gloo_group(store, "control", mesh.rank, mesh.size)
        self.answers = gloo_group(store, "answers", mesh.rank, mesh.size)
        """For `gather` alone: another thread may be receiving the next message meanwhile."""

    def device_group(self, name: str, rank: int, size: int, device: torch.device) -> Group:
        """See `device_group`. Kept for later engines: NCCL takes a second to make one."""
        name = f"{name} {device.type}"
        if name not in self.groups:
            began = time.perf_counter()
            self.groups[name] = device_group(self.store, name, rank, size, device)
            logger.debug("joined group %s of %d in %.1f s", name, size, time.perf_counter() - began)
        return self.groups[name]

    def abort(self) -> None:
        """Have the compute device give up what it waits for: of another rank that is gone nothing will come. Closed
        connections say so to the host; a GPU that waits in a collective goes on for ever, and whoever waits for that
        GPU with it. The groups are of no use any more."""
        self.broken = True
        groups = [group for group in self.groups.values() if not isinstance(group, ProcessGroupGloo)]
        threads = [threading.Thread(target=group.abort, name="abort", daemon=True) for group in groups]
        for thread in threads:
            thread.start()
        end = time.monotonic() + ABORTING
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def send(self, message: Any) -> None:
        """Raises LostRankError."""
        data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(data)]))
        self._broadcast(data)

    def receive(self) -> Any:
        """Waits for rank 0. Raises LostRankError."""
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        data = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(data)
        # Written by rank 0 of the same job, over a connection that the ranks made with each other.
        return pickle.loads(data.numpy().tobytes())

    def gather(self, error: str) -> list[str]:
        """The error of every rank, empty where there was none; every rank calls it."""
        told = error.encode()[:TOLD_BYTES].ljust(TOLD_BYTES, b"\0")
        mine = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        found = [torch.empty(TOLD_BYTES, dtype=torch.uint8) for _ in range(self.mesh.size)]
        waited(self.answers.allgather([found], [mine]), self.mesh)
        return [each.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for each in found]

    def _broadcast(self, data: Tensor) -> None:
        waited(self.group.broadcast(data, 0), self.mesh)


def waited(work: Any, mesh: Mesh) -> None:
    """work: None where NCCL has put a collective on the stream that computes, in order with what needs it. Raises
    LostRankError where a rank has gone."""
    if work is None:
        return
    try:
        work.wait()
    except RuntimeError as error:
        raise LostRankError(f"rank {mesh.rank} of {mesh.size} has lost another rank: {first_line(error)}") from error
