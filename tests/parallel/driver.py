"""One rank of a mesh whose engines run one after another.

    python -m tests.parallel.driver RANK SIZE ADDRESS FILE

FILE is JSON: a list of engines, each with `model`, `settings`, `prompts` and `params`, and what is to happen to it.
Rank 0 writes what every engine generated beside it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexbatch import LLM, SamplingParams
from flexbatch.config import EngineConfig
from flexbatch.execution.executor import Executor
from flexbatch.execution.graphs import DecodeGraphs
from flexbatch.execution.piece_graphs import PieceGraphs
from flexbatch.execution.pipelined import PipelinedPasses
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.tick_halves import TickHalves
from flexbatch.memory.weights import WeightStore
from flexbatch.parallel.channel import RankChannel, open_store
from flexbatch.parallel.mesh import Mesh
from flexbatch.parallel.tensor_ranks import TensorRanks
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.follower import Follower, follow_launched
from flexbatch.planner.planner import Planner
from flexbatch.planner.rank_commands import Leave
from flexbatch.planner.requirements import Graphs
from tests.execution.test_answer_lengths import ended
from tests.execution.test_graphs import FakeGraph, Recorder

SETTINGS = {"hardware": "cpu", "device": "cpu", "dtype": "float32", "gpu_memory": "1GiB", "cpu_memory": "1GiB"}


@contextlib.contextmanager
def stepping_aside(llm: LLM, counted: list[int]) -> Iterator[None]:
    """Any sequence may be told to step aside before any pass, in an engine that has seen short answers alone."""
    chance, next_pass, lengths = random.Random(3), Scheduler.next_pass, llm._loop.lengths
    for i in range(60):
        lengths.observe(ended(i, 3))
    lengths.stale = 100
    lengths.update([])
    llm._loop.lengths.next_comparison = 10**9

    def disturbed(scheduler: Scheduler, *part: int) -> Any:
        if scheduler.settled and len(scheduler.running) > 1 and chance.random() < 0.4:
            sequence = chance.choice(list(scheduler.running.values()))
            scheduler.step_aside(sequence, in_place=not scheduler.aside.recomputes or chance.random() < 0.5)
            counted.append(1)
            if not scheduler.running:
                scheduler.admit()
        return next_pass(scheduler, *part)

    Scheduler.next_pass = disturbed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Scheduler.next_pass = next_pass  # type: ignore[method-assign]


@contextlib.contextmanager
def counting_in_flight(most: list[int]) -> Iterator[None]:
    """Notes how many passes of a pipeline are in flight, and checks them."""
    fill = PipelinedPasses.fill

    def counted(passes: PipelinedPasses) -> None:
        fill(passes)
        passes.check()
        passes.scheduler.check()
        most.append(len(passes.in_flight))

    PipelinedPasses.fill = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        PipelinedPasses.fill = fill  # type: ignore[method-assign]


@contextlib.contextmanager
def noting(events: list[tuple]) -> Iterator[None]:
    """Notes, in their order, ticks that are begun on this rank (layer, micro-batch), slices of weights that are put on
    the link (layer), sums over ranks, and how many passes are in flight in every turn."""
    named: dict[tuple[type, str], Callable[..., tuple]] = {
        (TickHalves, "begin"): lambda tick, *_: ("tick", tick.layer, tick.micro_batch),
        (WeightStore, "send"): lambda layer, *_: ("fetch", layer),
        (TensorRanks, "sum"): lambda _: ("sum",),
    }
    before = {(owner, name): getattr(owner, name) for owner, name in [*named, (PipelinedPasses, "fill")]}

    def noted(key: tuple[type, str], what: Callable[..., tuple]) -> None:
        def note(self: Any, *words: Any) -> Any:
            events.append(what(*words))
            return before[key](self, *words)

        setattr(*key, note)

    def filled(passes: PipelinedPasses) -> None:
        before[PipelinedPasses, "fill"](passes)
        if passes.in_flight:
            events.append(("in flight", len(passes.in_flight)))

    for key, what in named.items():
        noted(key, what)
    PipelinedPasses.fill = filled  # type: ignore[method-assign]
    try:
        yield
    finally:
        for key, method in before.items():
            setattr(*key, method)


def generated(engine: dict[str, Any], channel: RankChannel | None = None) -> dict[str, Any]:
    """Token ids and errors of every prompt, each of its samples; twice where ``again`` names further prompts.
    ``stages``: of a pipeline; the other ranks share each layer."""
    size, stages = (1, 1) if channel is None else (channel.mesh.size, engine.get("stages", 1))
    sizes = {"pipeline_parallel_size": stages, "tensor_parallel_size": size // stages}
    config = EngineConfig(model=engine["model"], **{**SETTINGS, **sizes, **engine["settings"]})
    in_flight, events, graphs = [0], list[tuple](), list[FakeGraph]()
    params = [SamplingParams(**each) for each in engine["params"]]
    found, steps = [], list[int]()
    with contextlib.ExitStack() as stack:
        if engine.get("graphs") and size > 1:
            stack.enter_context(recording(Graphs(engine["graphs"], tuple(engine.get("pieces", ()))), graphs))
        llm = stack.enter_context(LLM.from_planner(Planner(config, channel=channel)))
        stack.enter_context(counting_in_flight(in_flight))
        if engine.get("events"):
            stack.enter_context(noting(events))
        if engine.get("steps_aside"):
            stack.enter_context(stepping_aside(llm, steps))
        for prompts in (engine["prompts"], *engine.get("again", ())):
            for each in llm.generate(prompts, params[: len(prompts)]):
                found.append([(sample.token_ids, sample.finish_reason) for sample in each.samples or [each]])
            assert llm.runner is not None
            llm.runner.check()
            llm.tiers.check()
        if llm.speculator is not None:
            llm.speculator.check()
        weights = sum(llm.engine_plan.weight_plan.tier_bytes(tier) for tier in ("gpu", "cpu", "disk"))
        told = {"read": llm.report()["loaded_bytes"], "weights": weights, "percent": config.percent}
        pieces = 0 if llm.runner is None or llm.runner.executor.pieces is None else llm.runner.executor.pieces.passes
        told["ring"] = 0 if llm.runner is None else llm.runner.cache.ring
    told |= {"in_pieces": pieces, "recorded": len(graphs), "replays": sum(graph.replays for graph in graphs)}
    return {"answers": found, "steps_aside": len(steps), "in_flight": max(in_flight), "events": events, **told}


@contextlib.contextmanager
def recording(kept: Graphs, made: list[FakeGraph]) -> Iterator[None]:
    """Executors that record passes as those on GPUs do, in stand-ins for graphs. Rank 0 has it decided that it keeps
    these; the others keep what they are told."""
    begin, count = Executor.__init__, EnginePlan.graphs
    names = list(inspect.signature(begin).parameters)

    def with_graphs(self: Executor, *words: Any, **named: Any) -> None:
        begin(self, *words, **named)
        told = {**dict(zip(names[1:], words, strict=False)), **named}
        record = Recorder()
        record.made = made
        sizes = self.cache.layout.page_tokens, self.arch.max_positions
        self.graphs = DecodeGraphs(self.device, *sizes, record, told["max_graphs"], ring=self.cache.ring)
        self.pieces = PieceGraphs(self.halves, self.device, record, told["piece_buckets"])
        self.pieces.recording_passes = 2

    Executor.__init__ = with_graphs  # type: ignore[method-assign]
    EnginePlan.graphs = lambda self, sizes: kept  # type: ignore[method-assign]
    try:
        yield
    finally:
        Executor.__init__, EnginePlan.graphs = begin, count  # type: ignore[method-assign]


def failing_at(number: int) -> None:
    """This rank's pass ``number`` fails."""
    run, seen = Follower.run, []

    def failing(follower: Follower, command: Any) -> None:
        seen.append(command)
        if len(seen) == number:
            raise ArithmeticError("this rank cannot count any further")
        run(follower, command)

    Follower.run = failing  # type: ignore[method-assign]


def main() -> int:
    rank, size, address, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    mesh = Mesh(rank, size, address, rank, size, hosts_store=rank == 0)
    channel = RankChannel(mesh, open_store(mesh))
    engines = json.loads(file.read_text())
    if rank:
        if engines[0].get("graphs"):
            with recording(Graphs(), []):
                return follow_launched(channel)
        if rank == size - 1 and (number := engines[0].get("fails_at")):
            failing_at(number)
        return follow_launched(channel)
    results = [generated(engine, channel) for engine in engines]
    channel.send(Leave())
    file.with_suffix(".results").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
