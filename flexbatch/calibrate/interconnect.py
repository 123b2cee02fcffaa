"""Rates between the GPUs of a host, and of their links and parts of the host when all of them are busy at once.

Each is measured by a process for each GPU, over the groups that an engine of several ranks has.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed import ReduceOp, Store

from flexbatch.calibrate.fits import fit_rate
from flexbatch.calibrate.host_together import HostTogether
from flexbatch.calibrate.links import MIB
from flexbatch.parallel import numa
from flexbatch.parallel.channel import Group, RankChannel, device_group, open_store
from flexbatch.parallel.mesh import Mesh
from flexbatch.parallel.processes import GRACE, RankProcesses, live_as_long_as_rank_0, log_as_rank_0, mesh_of_words
from flexbatch.parallel.tensor_ranks import TensorRanks
from flexbatch.policy.curve import Curve
from flexbatch.policy.hardware import Hardware
from flexbatch.validation.errors import DONE, LostRankError

logger = logging.getLogger("flexbatch")

MODULE = "flexbatch.calibrate.interconnect"
SUM_BYTES = tuple(1 << shift for shift in (14, 18, 20, 22, 24, 26, 28))
SEND_BYTES = tuple(1 << shift for shift in (16, 20, 24, 27))
COPY_BYTES = 256 * MIB
"""What the engine's passes need: a decode pass of 256 sequences adds up 2 to 4 MiB at a time, one of prompts 100."""
SHORTER = 64
"""On CPUs sizes are so much smaller."""
LAUNCHED = 100
"""Sums that are launched one after another: more would wait for room in the queue of launches."""
TOLD_SEQUENCES, TOLD_PASSES = 256, 10
"""Of a pass that ranks are told of, numbers and pages of each; and passes that they are told of in a row."""
WAITING = 300.0
"""Seconds for which one of the ranks that wait may be gone before this process ends with it: it measures something
else, and looks before it needs them."""
ROUNDS, SECONDS = 3, 0.08
"""Timings of each size, of which the fastest counts, and about how long each takes on an idle machine."""


def lacks_interconnect(hardware: Hardware, gpus: int) -> bool:
    """Whether a profile does not know how so many GPUs of its host work together."""
    together = hardware.links_together
    if gpus < 2 or hardware.origin != "measured":
        return False
    return together is None or hardware.cpu_attention_together is None or together.points[-1] < gpus


def with_interconnect(hardware: Hardware, gpus: int, ranks: WaitingRanks | None = None) -> Hardware:
    """A profile with what is measured between so many GPUs of this host. ranks: the others, where they were started
    earlier. Raises LostRankError."""
    found = measure_interconnect(hardware.device, gpus, ranks)
    errors = {**hardware.fit_error, **found.pop("fit_error")}
    said = f"measured on {gpus} GPUs of this host, a process each"
    source = {**hardware.source, **dict.fromkeys(found, said)}
    return dataclasses.replace(hardware, **found, fit_error=errors, source=source)


class WaitingRanks:
    """The processes of the other GPUs, which import what they need while this one measures something else, and take
    nothing of a GPU until all of them measure together."""

    def __init__(self, device_type: str, count: int) -> None:
        """Raises LostRankError, OSError."""
        self.device_type = device_type
        self.mesh = Mesh(0, count, "127.0.0.1:0", 0, count, hosts_store=True)
        self.store = open_store(self.mesh)
        address = f"127.0.0.1:{self.store.port}"
        others = [Mesh(rank, count, address, rank, count, False) for rank in range(1, count)]
        self.processes = RankProcesses(MODULE, others, WAITING)

    def measured(self) -> dict[str, Any]:
        """Raises LostRankError."""
        if self.processes.lost:
            raise LostRankError(self.processes.lost)
        self.processes.grace = GRACE
        self.store.set("device", self.device_type)
        return measured(self.mesh, self.store, self.device_type)

    def close(self, done: bool = False) -> None:
        """done: they have measured, and end by themselves."""
        if not done:
            self.processes.closing.set()
            self.processes.kill()
        self.processes.close()


def measure_interconnect(device_type: str, count: int, ranks: WaitingRanks | None = None) -> dict[str, Any]:
    """Fields of `Hardware`. ranks: are closed in any case. Raises LostRankError."""
    started, done = time.perf_counter(), False
    ranks = ranks or WaitingRanks(device_type, count)
    try:
        found, done = ranks.measured(), True
    finally:
        ranks.close(done)
    logger.info("measured the interconnect of %d GPUs in %.1f s", count, time.perf_counter() - started)
    return found


def main(words: Sequence[str] | None = None) -> int:
    """A rank other than 0."""
    words = sys.argv[1:] if words is None else words
    live_as_long_as_rank_0()
    log_as_rank_0(words)
    mesh = mesh_of_words(words)
    store = open_store(mesh)
    measured(mesh, store, store.get("device").decode())
    return DONE


def measured(mesh: Mesh, store: Store, device_type: str) -> dict[str, Any]:
    """What every rank does; all of them find the same."""
    device = torch.device(device_type, mesh.rank) if device_type == "cuda" else torch.device(device_type)
    group = device_group(store, "interconnect", mesh.rank, mesh.size, device)
    ranks, threads = Ranks(mesh, group, device), torch.get_num_threads()
    host = HostTogether(ranks, store, threads)
    alone = host.alone()
    undo = numa.run_near(device, mesh.size) if device.type == "cuda" else None
    try:
        rate, fixed, sum_error = ranks.sums()
        send, send_error = ranks.sends()
        points = sorted({1, *(2**i for i in range(1, mesh.size.bit_length()) if 2**i < mesh.size), mesh.size})
        rates = [ranks.copies(number) for number in points]
        # No link is faster beside others; where one seems to be, the machine was busy before.
        shares = [min(1.0, each / rates[0]) for each in rates]
        return {
            "interconnect": rate,
            "interconnect_seconds": fixed,
            "interconnect_send": send,
            "interconnect_launch_seconds": ranks.launching(),
            "tell_seconds": ranks.telling(store),
            "links_together": Curve(tuple(map(float, points)), tuple(shares)),
            **host.fields(alone, host.together()),
            "fit_error": {"interconnect": sum_error, "interconnect_send": send_error},
        }
    finally:
        if undo is not None:
            undo()


class Ranks:
    """The ranks that measure together: each does the same, as often as the others."""

    def __init__(self, mesh: Mesh, group: Group, device: torch.device) -> None:
        self.mesh, self.group, self.device = mesh, group, device
        self.cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.shorter = 1 if self.cuda else SHORTER
        self.tensor = TensorRanks(mesh, group, mesh.rank, ())

    def sums(self) -> tuple[float, float, float]:
        """(bytes a second that each GPU sends, fixed seconds of a sum, error of the fit), counted as a ring does it."""
        sizes = [size // self.shorter for size in SUM_BYTES]
        seconds = []
        for size in sizes:
            x = torch.zeros(size // self.dtype.itemsize, dtype=self.dtype, device=self.device)
            seconds.append(self.timed(partial(self.add_up, x)))
        sent = [2 * (self.mesh.size - 1) / self.mesh.size * size for size in sizes]
        fit = fit_rate(sent, seconds)
        return float(fit.rate), fit.fixed_seconds, fit.error

    def add_up(self, x: torch.Tensor) -> None:
        self.tensor.sum(x)

    def launching(self) -> float:
        """Seconds that the host needs to launch a sum; on CPUs it does the sum itself."""
        if not self.cuda:
            return 0.0
        x, found = torch.zeros(SUM_BYTES[0] // self.dtype.itemsize, dtype=self.dtype, device=self.device), []
        for _ in range(ROUNDS):
            self.slowest(0.0)
            began = time.perf_counter()
            for _ in range(LAUNCHED):
                self.add_up(x)
            found.append((time.perf_counter() - began) / LAUNCHED)
        return self.slowest(min(found))

    def telling(self, store: Store) -> float:
        """Seconds in which rank 0 has told the others what a pass of TOLD_SEQUENCES is, and they know it."""
        channel, found = RankChannel(self.mesh, store), []
        message = [(number, (number,), 300, 0, tuple(range(20)), 300) for number in range(TOLD_SEQUENCES)]
        for _ in range(ROUNDS):
            self.slowest(0.0)
            began = time.perf_counter()
            for _ in range(TOLD_PASSES):
                channel.send(message) if self.mesh.rank == 0 else channel.receive()
            found.append((time.perf_counter() - began) / TOLD_PASSES)
        return self.slowest(min(found))

    def sends(self) -> tuple[float, float]:
        """(bytes a second from one GPU to another one, error of the fit)."""
        sizes = [size // self.shorter for size in SEND_BYTES]
        seconds = []
        for size in sizes:
            x = torch.zeros(size, dtype=torch.uint8, device=self.device)
            seconds.append(self.timed(partial(self.send, x)))
        fit = fit_rate(sizes, seconds)
        return float(fit.rate), fit.error

    def send(self, x: torch.Tensor) -> None:
        if self.mesh.rank == 0:
            self.group.send([x], 1, 0).wait()
        elif self.mesh.rank == 1:
            self.group.recv([x], 0, 0).wait()

    def copies(self, number: int) -> float:
        """Bytes a second of the slowest link while this many GPUs are sent something by the host."""
        size = COPY_BYTES // self.shorter
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.cuda).fill_(1)
        near = torch.empty(size, dtype=torch.uint8, device=self.device)

        def copy() -> None:
            if self.mesh.rank < number:
                near.copy_(host, non_blocking=True)

        return size / self.timed(copy)

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of one ``work`` on the rank that takes longest; the same on every rank."""
        work()
        single = self.together(work, 1)
        calls = max(3, min(200, round(SECONDS / ROUNDS / max(single, 1e-7))))
        return min(self.together(work, calls) for _ in range(ROUNDS))

    def together(self, work: Callable[[], object], calls: int) -> float:
        self.slowest(0.0)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return self.slowest((time.perf_counter() - began) / calls)

    def slowest(self, seconds: float) -> float:
        """The longest time of any rank; all have come here when it returns."""
        x = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        self.group.allreduce([x], ReduceOp.MAX).wait()
        return float(x)
