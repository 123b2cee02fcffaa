"""Rank 0 of a tensor-parallel engine: has the other ranks do what it does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from flexbatch.execution.pass_batch import LogitsChunk, NewestTokens, PassBatch
from flexbatch.execution.runner import Runner
from flexbatch.parallel.channel import RankChannel, device_group, open_store
from flexbatch.parallel.mesh import Mesh
from flexbatch.parallel.processes import RankProcesses
from flexbatch.parallel.tensor_ranks import TensorRanks
from flexbatch.planner.engine_plan import Deployment
from flexbatch.planner.rank_commands import BeginEngine, CloseEngine, Leave, RankCommand, RunPass
from flexbatch.validation.errors import LostRankError

FOLLOWER = "flexbatch.planner.follower"


@dataclass
class Leader:
    """``ranks`` are the collectives inside of a pass, ``channel`` is for what decides it. ``processes``: those that
    were started for this engine; None where somebody else has started them."""

    channel: RankChannel
    ranks: TensorRanks
    processes: RankProcesses | None
    threads: int
    """Of this process, before it shared its cores with the other ranks."""
    runner: Runner | None = field(default=None)
    """That of the latest block."""
    unfinished: Iterator[LogitsChunk] | None = field(default=None)
    """A pass in which the other ranks may be, and that nobody has read to its end."""

    def send(self, command: RankCommand) -> None:
        """Raises LostRankError."""
        if self.channel.broken:
            raise LostRankError(
                "a pass has failed before its end, where the other ranks wait for it: open a new engine"
            )
        with self.saying_who_is_lost():
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
        self.unfinished = chunks
        with self.whole_or_broken(), self.saying_who_is_lost():
            if newest is not None:
                self.ranks.broadcast(newest.token_ids.clone())
            # Not `yield from`, which would close the pass with this generator; `finish` brings it to its end.
            for chunk in chunks:  # noqa: UP028
                yield chunk
            self.unfinished = None

    @torch.inference_mode()
    def finish(self) -> None:
        """Bring a pass to its end that was given up here: the other ranks are still in it."""
        unfinished, self.unfinished = self.unfinished, None
        if unfinished is not None:
            with self.whole_or_broken():
                for _ in unfinished:
                    pass

    @contextlib.contextmanager
    def whole_or_broken(self) -> Iterator[None]:
        """Of a part of a pass: where it fails, the engine has ended, and the other ranks with it."""
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException:
            self.channel.broken, self.unfinished = True, None
            if self.processes is not None:
                self.processes.closing.set()
                self.processes.kill()
            raise

    @contextlib.contextmanager
    def saying_who_is_lost(self) -> Iterator[None]:
        """Name the rank that has ended, rather than the connection that it left."""
        try:
            yield
        except LostRankError as error:
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
                if self.processes is not None:
                    self.channel.send(Leave())
        finally:
            if self.processes is not None:
                self.processes.close()


def lead(deployment: Deployment) -> Leader | None:
    """Meets the other ranks, or starts them; None for an engine of one process. Raises LostRankError."""
    size = len(deployment.shards)
    if not size:
        return None
    channel, processes, threads = deployment.channel, None, torch.get_num_threads()
    if channel is None:
        mesh = Mesh(0, size, "127.0.0.1:0", 0, size, hosts_store=True)
        store = open_store(mesh)
        others = [Mesh(rank, size, f"127.0.0.1:{store.port}", rank, size, False) for rank in range(1, size)]
        processes = RankProcesses(FOLLOWER, others)
    try:
        if channel is None:
            channel = RankChannel(mesh, store)
        own_threads = max(1, threads // channel.mesh.local_size)
        channel.engines += 1
        config, budgets, shards = deployment.config, deployment.budgets, tuple(deployment.shards)
        opened = BeginEngine(
            channel.engines, config, deployment.device.type, deployment.dtype, budgets, shards, own_threads
        )
        channel.send(opened)
        torch.set_num_threads(own_threads)
        return Leader(channel, make_ranks(channel, opened, deployment.device), processes, threads)
    except BaseException:
        torch.set_num_threads(threads)
        if processes is not None:
            processes.closing.set()
            processes.kill()
            processes.close()
        raise


def make_ranks(channel: RankChannel, opened: BeginEngine, device: torch.device) -> TensorRanks:
    """The collectives of one engine, of this rank; all ranks make them together."""
    group = device_group(channel.store, f"tensor {opened.number}", channel.mesh, device)
    return TensorRanks(channel.mesh, group, [shard.vocabulary for shard in opened.shards])
