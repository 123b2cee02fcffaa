"""A rank other than 0: does to its part of the model what rank 0 does to its own."""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from flexbatch.execution.pass_batch import LogitsChunk, NewestTokens
from flexbatch.execution.runner import Runner, open_runner
from flexbatch.memory import page_moves
from flexbatch.models.lora.adapter_set import AdapterSet
from flexbatch.models.opened import open_configured
from flexbatch.parallel.channel import RankChannel, open_store
from flexbatch.parallel.processes import (
    ignore_interruptions,
    live_as_long_as_rank_0,
    log_as_rank_0,
    log_error,
    mesh_of_words,
)
from flexbatch.parallel.rank_links import RankLinks
from flexbatch.planner.adapters import configured
from flexbatch.planner.engine_plan import Deployment, EnginePlan
from flexbatch.planner.leader import link
from flexbatch.planner.loader import PlacedModel
from flexbatch.planner.rank_commands import (
    BeginEngine,
    CloseEngine,
    Leave,
    MakeRunner,
    PlaceWeights,
    RankCommand,
    ReachLonger,
    RunHead,
    RunPass,
)
from flexbatch.trace import Tracer
from flexbatch.validation.errors import CRASH, DONE, LostRankError

logger = logging.getLogger("flexbatch")

PASSES_PER_LINE = 10
"""Of the log, at level DEBUG."""


class Follower:
    """One engine, as far as a rank has it: its tiers, its part of the weights, and its heads of the cache."""

    def __init__(self, deployment: Deployment, links: RankLinks) -> None:
        self.deployment, self.links = deployment, links
        self.model = PlacedModel(deployment, Tracer())
        self.runner: Runner | None = None
        self.in_flight: deque[Iterator[LogitsChunk]] = deque()
        """Passes of a pipeline whose head this rank has a part of, the oldest first."""
        self.passes = 0
        """Begun here so far."""

    def place(self, command: PlaceWeights) -> None:
        weight_plan = self.deployment.weight_plan(command.policy, command.num_slabs)
        if self.model.weights is not None:
            self.model.weights.drain()
        if self.model.weights is None or self.model.weights.plan != weight_plan:
            self.close_runner()
            self.model.place(EnginePlan(self.deployment, command.policy, None, weight_plan))

    def make_runner(self, command: MakeRunner) -> None:
        self.close_runner()
        weights = self.model.weights
        assert weights is not None
        weights.drain()
        self.runner = open_runner(
            self.deployment.arch,
            weights,
            self.deployment.layout(command.policy),
            command.policy,
            command.sizes,
            self.model.tiers,
            self.model.queues,
            command.logits_chunk_bytes,
            command.max_graphs,
            command.piece_buckets,
            links=self.links,
        )

    def reach(self, command: ReachLonger) -> None:
        assert self.runner is not None
        self.runner.reach(command.sizes)

    def run(self, command: RunPass) -> None:
        """The pass as rank 0 runs it. What it samples never comes here, but for tokens that it has not read itself."""
        assert self.runner is not None
        page_moves.follow(self.runner.cache, command.orders)
        newest = None
        if command.newest is not None:
            tokens = torch.empty(len(command.newest), dtype=torch.int64, device=self.deployment.device)
            assert self.links.tensor is not None
            newest = NewestTokens(self.links.tensor.broadcast(tokens), command.newest)
        self.passes += 1
        if self.passes % PASSES_PER_LINE == 0:
            logger.debug("pass %d", self.passes)
        chunks = self.runner.executor.run(command.batch, newest)
        if self.links.stages is not None and self.links.stages.is_first:
            next(chunks)
            self.in_flight.append(chunks)
            return
        for _ in chunks:
            raise AssertionError("logits belong to rank 0")

    def run_head(self) -> None:
        """Of the stages of a pipeline only the first has it."""
        if self.in_flight:
            for _ in self.in_flight.popleft():
                raise AssertionError("logits belong to rank 0")

    def close_runner(self) -> None:
        runner, self.runner = self.runner, None
        if runner is not None:
            runner.close()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.model.close)
            stack.callback(self.close_runner)


def open_follower(channel: RankChannel, opened: BeginEngine) -> Follower:
    torch.set_num_threads(opened.threads)
    mesh, config = channel.mesh, opened.config
    device = torch.device(f"cuda:{mesh.local_rank}" if opened.device_type == "cuda" else "cpu")
    model, _ = configured(config, open_configured(config))
    deployment = Deployment(
        *(config, model, device, opened.dtype, opened.budgets, None, AdapterSet(model.arch, ())),
        shards=opened.shards,
        stages=opened.stages,
        rank=mesh.rank,
    )
    return Follower(deployment, link(channel, deployment))


@torch.inference_mode()
def follow(channel: RankChannel) -> None:
    """Engine after engine, until rank 0 leaves. Raises whatever fails here: the process is then to end, which all
    others notice."""
    commands = received(channel)
    with contextlib.ExitStack() as stack, aborting(channel):
        follower: Follower | None = None
        while True:
            command = commands.get()
            if isinstance(command, Exception):
                raise command
            if isinstance(command, Leave):
                return
            if isinstance(command, BeginEngine):
                follower = stack.enter_context(contextlib.closing(open_follower(channel, command)))
            elif isinstance(command, CloseEngine):
                assert follower is not None
                follower.links.synchronize()
                follower = None
                stack.close()
            else:
                assert follower is not None, command
                do(follower, command, channel)


@contextlib.contextmanager
def aborting(channel: RankChannel) -> Iterator[None]:
    """Where the body fails, this rank's device waits no longer for others: nothing could be closed before."""
    try:
        yield
    except BaseException:
        channel.abort()
        raise


def received(channel: RankChannel) -> queue.SimpleQueue[RankCommand | Exception]:
    """What rank 0 tells, as it comes, from a thread of its own: rank 0 does not wait until a pass has ended here."""
    commands: queue.SimpleQueue[RankCommand | Exception] = queue.SimpleQueue()

    def listen() -> None:
        try:
            command: RankCommand | None = None
            with aborting(channel):
                while not isinstance(command, Leave):
                    command = channel.receive()
                    commands.put(command)
        except Exception as error:
            commands.put(error)

    threading.Thread(target=listen, name="commands of rank 0", daemon=True).start()
    return commands


def do(follower: Follower, command: RankCommand, channel: RankChannel) -> None:
    """What does not come to pass is told to rank 0, but for a pass: its other ranks wait in its middle."""
    if isinstance(command, RunPass):
        follower.run(command)
        return
    if isinstance(command, RunHead):
        follower.run_head()
        return
    steps: dict[type, Callable] = {
        PlaceWeights: follower.place,
        MakeRunner: follower.make_runner,
        ReachLonger: follower.reach,
    }
    failure, began = "", time.perf_counter()
    try:
        steps[type(command)](command)
        logger.debug("%s took %.1f s", type(command).__name__, time.perf_counter() - began)
    except Exception as error:
        log_error(channel.mesh.rank, error)
        failure = f"{type(error).__name__}: {error}"
    channel.gather(failure)


def followed(channel: RankChannel) -> int:
    """`follow` as a process: its exit code."""
    rank = channel.mesh.rank
    try:
        follow(channel)
        return DONE
    except LostRankError as error:
        logger.error("rank %d ends: %s", rank, error)
    except Exception as error:
        log_error(rank, error)
    return CRASH


def main(words: Sequence[str] | None = None) -> int:
    """A rank that rank 0 has started."""
    words = sys.argv[1:] if words is None else words
    live_as_long_as_rank_0()
    log_as_rank_0(words)
    mesh = mesh_of_words(words)
    return followed(RankChannel(mesh, open_store(mesh)))


def follow_launched(channel: RankChannel) -> int:
    """A rank that torchrun has started."""
    ignore_interruptions()
    return followed(channel)
