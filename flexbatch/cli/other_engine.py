"""The process of an engine that has its requests from rank 0, which started it or met it through torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flexbatch import jobs
from flexbatch.engine import LLM
from flexbatch.execution import sequence as execution
from flexbatch.execution.shared_line import DrawnLine
from flexbatch.execution.watch import Watch
from flexbatch.parallel.channel import open_store
from flexbatch.parallel.links import EngineGroup, Link, link_to_rank_0
from flexbatch.parallel.processes import live_as_long_as_rank_0, log_as_rank_0, log_error, mesh_of_words
from flexbatch.planner import engine_messages as messages
from flexbatch.planner.planner import Planner
from flexbatch.request import Request
from flexbatch.validation.errors import CRASH, DONE, LostRankError

if TYPE_CHECKING:
    from flexbatch.parallel.channel import RankChannel

logger = logging.getLogger("flexbatch")


class Counter:
    """Where an engine draws its requests: the connection to rank 0, read by a thread of its own."""

    def __init__(self, link: Link) -> None:
        self.link, self.run = link, 0
        self.dry = True
        """Whether rank 0 has said that nobody waits, and not said since that somebody does."""
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._shares: queue.SimpleQueue[messages.Share] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="rank 0", daemon=True).start()

    def _read(self) -> None:
        try:
            while not isinstance(message := self.link.receive(), messages.EndEngine):
                if isinstance(message, messages.Share):
                    # Here and not where it is taken: `More` may be the next message.
                    self.dry = not message.requests
                    self._shares.put(message)
                elif isinstance(message, messages.More):
                    self.dry = False
                self._messages.put(message)
            self._messages.put(message)
        except LostRankError as error:
            logger.error("%s", error)
            sys.stderr.flush()
            # In the middle of a pass, perhaps: nobody is there any more who would have its tokens.
            os._exit(CRASH)

    def draw(self, free: int, slots: int) -> Sequence[Request]:
        """Requests for free slots; rank 0 answers at once."""
        if self.dry or free < 1:
            return ()
        self.link.send(messages.Want(self.run, free, slots))
        return self._shares.get().requests

    def take(self, wait: bool) -> list[Any]:
        """What rank 0 has said since the last call. wait: for something, if there is nothing."""
        found = [self._messages.get()] if wait else []
        while not self._messages.empty():
            found.append(self._messages.get())
        return [each for each in found if not isinstance(each, messages.Share | messages.More)]


class OtherEngine(LLM):
    """An engine that runs what it draws from rank 0, until that closes it."""

    counter: Counter
    line: DrawnLine

    @classmethod
    def at(cls, counter: Counter, planner: Planner) -> OtherEngine:
        engine = cls.__new__(cls)
        engine.counter, engine.line = counter, DrawnLine(engine.drawn)
        engine._start(planner, False, engine.line)
        engine.watch(Watch(engine.seen, engine.seen))
        return engine

    def drawn(self) -> Sequence[Request]:
        scheduler = self._loop.scheduler
        if scheduler is None:
            return ()
        slots = scheduler.admission_limit
        return self.counter.draw(slots - scheduler.num_sequences - len(scheduler.waiting), slots)

    def seen(self, what: Any) -> None:
        self.counter.link.send(messages.SeenElsewhere(what))

    @property
    def idle(self) -> bool:
        scheduler = self._loop.scheduler
        if scheduler is None:
            return True
        return self.counter.dry and not (scheduler.started or scheduler.waiting or len(self.line))

    def serve(self) -> None:
        """Until rank 0 closes this engine. Raises what ends it."""
        steps: dict[type, Callable[[Any], None]] = {
            messages.PlaceFor: self.place,
            messages.Prepare: self.prepare_for,
            messages.BeginRun: self.begin,
            messages.GiveBack: self.give_back,
            messages.Drop: self.drop,
            messages.EndRun: self.end,
            messages.AskReport: self.tell_report,
        }
        while True:
            for message in self.counter.take(wait=self.idle):
                if isinstance(message, messages.EndEngine):
                    return
                with torch.inference_mode():
                    steps[type(message)](message)
            if self._loop.scheduler is not None and not self.idle:
                self.turn()

    def turn(self) -> None:
        loop = self._loop
        ended = [
            messages.Ended(sequence.request.index, sequence.request.sample, completion, refused)
            for sequence, completion, refused in self.completions(loop.advance(complete=False))
        ]
        if ended:
            self.counter.dry = False
            self.counter.link.send(messages.Finished(self.counter.run, ended))

    def completions(self, sequences: Sequence[execution.Sequence]) -> list[tuple[execution.Sequence, Any, bool]]:
        return [(each, self._intake.completion_of(each), each.table is None) for each in sequences]

    def follow(self, plan: messages.RunPlan) -> None:
        """Plan as rank 0 does: by the same rates, and with the bits that it has chosen."""
        planner = self.planner
        if plan.hardware is not None:
            planner.machine.recalibrate(plan.hardware)
        if planner.config.allow_bits:
            config = dataclasses.replace(
                planner.config,
                allow_bits=None,
                weight_bits=plan.policy.weight_bits,
                cache_bits=plan.policy.cache_bits,
            )
            planner.config, planner.deployment = config, dataclasses.replace(planner.deployment, config=config)

    def place(self, message: messages.PlaceFor) -> None:
        self.follow(message.plan)
        self._capacity.place(self.planner.replan(message.plan.job))

    def prepare_for(self, message: messages.Prepare) -> None:
        self.follow(message.plan)
        self._capacity.prepare(message.plan.job)
        self.counter.link.send(messages.Prepared())

    def begin(self, message: messages.BeginRun) -> None:
        """Not where one is going on: what came later is like what came first, and a block that is too small is made
        anew."""
        self.counter.run, loop, plan = message.run, self._loop, message.plan
        if loop.scheduler is not None:
            return
        self.follow(plan)
        runner = self._capacity.prepare(plan.job) if plan.exactly else self._capacity.prepare_largest(plan.job)
        self.counter.dry = False
        loop.begin(runner, (), self._capacity.speculator)

    def give_back(self, _: messages.GiveBack) -> None:
        requests = [*self.line]
        self.line.clear()
        if (scheduler := self._loop.scheduler) is not None:
            unread = [each for each in scheduler.waiting if not each.num_output_tokens]
            requests += [each.request for each in unread]
            scheduler.abort(lambda sequence: sequence in unread)
        self.counter.link.send(messages.Returned(self.counter.run, requests))

    def drop(self, message: messages.Drop) -> None:
        self.line.keep(lambda request: request.index not in message.indices)
        self._loop.abort({*message.indices})

    def end(self, _: messages.EndRun) -> None:
        self.counter.dry = True
        self._loop.drop_all()

    def tell_report(self, _: messages.AskReport) -> None:
        self.counter.link.send(messages.Reported(jobs.report(self._loop, self._model.describe())))


def run_engine(link: Link, engine: int, channel: RankChannel | None = None) -> int:
    """The exit code of the process. channel: to the other ranks of this engine, where torchrun has started them."""
    try:
        opened: messages.OpenEngine = link.receive()
        torch.set_num_threads(opened.threads)
        use_gpus(opened.first_gpu, opened.config.mesh_shape.size)
        planner = Planner(opened.config, channel=channel, group=EngineGroup(opened.local_engines))
        llm = OtherEngine.at(Counter(link), planner)
        with llm:
            link.send(messages.Opened())
            llm.serve()
        return DONE
    except LostRankError as error:
        logger.error("engine %d ends: %s", engine, error)
    except Exception as error:
        log_error(engine, error)
        sys.stderr.flush()
        with contextlib.suppress(LostRankError):
            link.send(messages.Failed(f"{type(error).__name__}: {error}"))
    return CRASH


def use_gpus(first: int, count: int) -> None:
    """Have this process, which has not looked at its GPUs yet, and those that it starts see no others."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = [each.strip() for each in seen if each.strip()] or [str(each) for each in range(first + count)]
    if chosen := visible[first : first + count]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)


def main(words: Sequence[str] | None = None) -> int:
    """An engine that rank 0 has started."""
    words = sys.argv[1:] if words is None else words
    live_as_long_as_rank_0()
    log_as_rank_0(words)
    mesh = mesh_of_words(words)
    return run_engine(link_to_rank_0(mesh, open_store(mesh), mesh.rank), mesh.rank)
