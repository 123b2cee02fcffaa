"""Rank 0 of an engine of several: has the other ranks do what it does."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch

from flexbatch.execution.pass_batch import LogitsChunk, NewestTokens, PassBatch
from flexbatch.execution.runner import Runner
from flexbatch.parallel.channel import RankChannel, open_store
from flexbatch.parallel.mesh import Mesh
from flexbatch.parallel.processes import RankProcesses
from flexbatch.parallel.rank_links import RankLinks
from flexbatch.parallel.stage_ranks import StageRanks
from flexbatch.parallel.tensor_ranks import TensorRanks
from flexbatch.planner.engine_plan import Deployment
from flexbatch.planner.rank_commands import BeginEngine, CloseEngine, Leave, RankCommand, RunHead, RunPass
from flexbatch.validation.errors import LostRankError

logger = logging.getLogger("flexbatch")

FOLLOWER = "flexbatch.planner.follower"


@dataclass
class Leader:
    """``links`` are what happens between ranks inside of a pass, ``channel`` is for what decides it. ``processes``:
    those that were started for this engine; None where somebody else has started them."""

    channel: RankChannel
    links: RankLinks
    processes: RankProcesses | None
    threads: int
    """Of this process, before it shared its cores with the other ranks."""
    runner: Runner | None = field(default=None)
    """That of the latest block."""
    unfinished: list[Iterator[LogitsChunk]] = field(default_factory=list)
    """Passes in which the other ranks may be, and that nobody has read to their ends, the oldest first."""

    def send(self, command: RankCommand) -> None:
        """Passes that were given up come to their ends before anything but another pass. Raises LostRankError."""
        if self.channel.broken:
            raise LostRankError(
                "a pass has failed before its end, where the other ranks wait for it: open a new engine"
            )
        with self.saying_who_is_lost():
            if self.links.stages is None or not isinstance(command, RunPass | RunHead):
                self.finish()
            self.channel.send(command)

    @contextlib.contextmanager
    def beside(self, command: RankCommand) -> Iterator[None]:
        """The other ranks follow the command while the body does the same here. Raises LostRankError with what one of
        them could not do."""
        self.send(command)
        failure = ""
        try:
            yield
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            with self.saying_who_is_lost():
                errors = self.channel.gather(failure)
        if found := next(((rank, error) for rank, error in enumerate(errors) if error), None):
            raise LostRankError("rank {} failed: {}".format(*found))

    def lead(
        self, chunks: Iterator[LogitsChunk], batch: PassBatch, newest: NewestTokens | None
    ) -> Iterator[LogitsChunk]:
        """See `pass_batch.Lead`."""
        assert self.runner is not None and self.runner.cache.orders is not None
        orders = self.runner.cache.orders.take()
        self.send(RunPass(batch, orders, None if newest is None else dict(newest.rows)))
        if self.links.stages is not None:
            chunks = self.heading(chunks)
        self.unfinished.append(chunks)
        with self.whole_or_broken(), self.saying_who_is_lost():
            if newest is not None and self.links.tensor is not None:
                self.links.tensor.broadcast(newest.token_ids.clone())
            # Not `yield from`, which would close the pass with this generator; `finish` brings it to its end.
            for chunk in chunks:  # noqa: UP028
                yield chunk
            self.unfinished.remove(chunks)

    def heading(self, chunks: Iterator[LogitsChunk]) -> Iterator[LogitsChunk]:
        """A pass of a pipeline: where its layers are launched here, and the rows that the head reads are wanted, those
        with parts of the head are told to read them, too."""
        yield from islice(chunks, 1)
        if self.links.tensor is not None:
            self.send(RunHead())
        yield from chunks

    @torch.inference_mode()
    def finish(self) -> None:
        """Bring passes to their ends that were given up here: the other ranks are still in them."""
        if self.channel.broken:
            self.unfinished.clear()
        with self.whole_or_broken():
            while self.unfinished:
                chunks = self.unfinished.pop(0)
                for _ in chunks:
                    pass

    @contextlib.contextmanager
    def whole_or_broken(self) -> Iterator[None]:
        """Of a part of a pass: where it fails, the engine has ended, and the other ranks with it."""
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException:
            self.unfinished.clear()
            if self.processes is not None:
                self.processes.closing.set()
                self.processes.kill()
            self.channel.abort()
            raise

    @contextlib.contextmanager
    def saying_who_is_lost(self) -> Iterator[None]:
        """Name the rank that has ended, rather than the connection that it left."""
        try:
            yield
        except LostRankError as error:
            self.channel.abort()
            if self.processes is None:
                raise
            end = time.monotonic() + 1.0
            while not (lost := self.processes.lost) and time.monotonic() < end:
                time.sleep(0.02)  # its thread has to see it end
            self.processes.told.set()
            raise LostRankError(lost or str(error)) from error

    def close(self) -> None:
        torch.set_num_threads(self.threads)
        try:
            with contextlib.suppress(LostRankError):
                self.finish()
                self.send(CloseEngine())
                self.links.synchronize()
                if self.processes is not None:
                    self.channel.send(Leave())
        finally:
            if self.processes is not None:
                self.processes.close()


def lead(deployment: Deployment) -> Leader | None:
    """Meets the other ranks, or starts them; None for an engine of one process. Raises LostRankError."""
    size = deployment.mesh.size
    if size == 1:
        return None
    channel, processes, threads = deployment.channel, None, torch.get_num_threads()
    if channel is None:
        mesh = Mesh(0, size, "127.0.0.1:0", 0, size, hosts_store=True)
        store = open_store(mesh)
        others = [Mesh(rank, size, f"127.0.0.1:{store.port}", rank, size, False) for rank in range(1, size)]
        processes = RankProcesses(FOLLOWER, others)
    try:
        if channel is None:
            began = time.perf_counter()
            channel = RankChannel(mesh, store)
            logger.debug("met %d ranks in %.1f s", size - 1, time.perf_counter() - began)
        own_threads = max(1, threads // channel.mesh.local_size)
        opened = BeginEngine(
            deployment.config,
            deployment.device.type,
            deployment.dtype,
            deployment.budgets,
            deployment.shards,
            deployment.stages,
            own_threads,
        )
        channel.send(opened)
        torch.set_num_threads(own_threads)
        return Leader(channel, link(channel, deployment), processes, threads)
    except BaseException:
        torch.set_num_threads(threads)
        if processes is not None:
            processes.closing.set()
            processes.kill()
            processes.close()
        raise


def link(channel: RankChannel, deployment: Deployment) -> RankLinks:
    """What this rank has to others of its engine; all ranks make it together."""
    shape, device, tensor, stages = deployment.mesh, deployment.device, None, None
    at, sizes = shape.at(deployment.rank), f"{shape.pipeline} x {shape.tensor}"
    if shape.tensor > 1:
        group = channel.device_group(f"tensor {sizes} {at.pipeline}", at.tensor, shape.tensor, device)
        tensor = TensorRanks(channel.mesh, group, at.tensor, [shard.vocabulary for shard in deployment.shards])
    if shape.pipeline > 1:
        forward, back = (
            channel.device_group(f"{name} {sizes} {at.tensor}", at.pipeline, shape.pipeline, device)
            for name in ("forward", "back")
        )
        like = torch.empty(0, deployment.arch.hidden_size, dtype=deployment.dtype, device=device)
        stages = StageRanks(channel.mesh, at.pipeline, shape.pipeline, forward, back, like)
    return RankLinks(tensor, stages)
