"""The engine: load a model over the tiers, run requests through it, give results.

`generate`, `stream` and `step` turn `loop.EngineLoop`.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from typing import Any

from flexbatch.config import EngineConfig
from flexbatch.execution.feed import Feed
from flexbatch.execution.job import Job
from flexbatch.execution.runner import Runner
from flexbatch.execution.turns import Turns
from flexbatch.intake import Intake, Item, OnText, Params, requests_of
from flexbatch.loader import load_model
from flexbatch.loop import PEEKED_BLOCKS, EngineLoop
from flexbatch.planner import monitor
from flexbatch.planner.capacity import Capacity
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.planner import Planner
from flexbatch.planner.report import Statistics, describe_memory
from flexbatch.policy.policy import Policy
from flexbatch.request import Completion, SamplingParams
from flexbatch.text.prompts import Prompt
from flexbatch.trace import RecordingTracer, Tracer
from flexbatch.validation.checks import check_keywords

logger = logging.getLogger("flexbatch")


class LLM:
    """A model whose weights, KV cache and activations are spread over GPU, CPU and disk.

    Keywords are the fields of `EngineConfig`; what is None is chosen. Use as a context manager, or call `close`: it
    frees pinned memory, threads, files. Raises ConfigurationError for wrong settings, DoesNotFitError when the
    budgets are short (before anything is loaded), CheckpointError for a bad model.
    """

    loop_class = EngineLoop

    def __init__(self, model: str = "demo", *, trace: bool = False, **settings: Any) -> None:
        check_keywords("LLM", settings, ["trace", *EngineConfig.__dataclass_fields__])
        self._start(Planner(EngineConfig(model=model, **settings)), trace)

    @classmethod
    def from_config(cls, config: EngineConfig, trace: bool = False, job: Job | None = None) -> LLM:
        """An engine from a ready configuration; ``job`` tells the planner what will be run."""
        return cls.from_planner(Planner(config, job), trace)

    @classmethod
    def from_planner(cls, planner: Planner, trace: bool = False) -> LLM:
        """An engine as planned."""
        engine = cls.__new__(cls)
        engine._start(planner, trace)
        return engine

    @classmethod
    def plan(cls, config: EngineConfig, job: Job) -> dict[str, Any]:
        """What `from_config` and running the job would put where, without loading anything: the first part of `report`,
        and the `Plan` as "plan".

        With a named machine (--hardware) and the default device, it is planned for that machine and its memory;
        nothing is measured. Raises DoesNotFitError when the job does not fit the budgets.
        """
        return Planner(config, job, dry=True).describe(job)

    def _start(self, planner: Planner, trace: bool) -> None:
        self.planner, self.config, self.generation = planner, planner.config, planner.generation
        engine_plan = planner.engine_plan
        self.arch, self.tokenizer = engine_plan.arch, engine_plan.model.tokenizer
        device, priced = engine_plan.device, engine_plan.plan is not None
        self.tracer: Tracer = RecordingTracer(device) if trace else monitor.UsageTracer(device) if priced else Tracer()
        self._turns = Turns()
        self._intake = Intake(planner.encoder, planner.generation, self.arch, self.config.seed)
        self._stack = contextlib.ExitStack()
        try:
            self._loaded = load_model(engine_plan, self.tracer, self._stack)
        except BaseException as error:
            self._stack.close()
            # The frames of the error hold what was loaded for as long as it is handled, and longer at a prompt.
            traceback.clear_frames(error.__traceback__)
            raise
        loaded = self._loaded
        self.tiers, self.queues = loaded.tiers, loaded.queues
        self.weights, self.speculator = loaded.weights, loaded.speculator
        self._capacity = Capacity(planner, self.weights, self.tiers, self.queues, self.speculator)
        self._loop = self.loop_class(planner, self._capacity, self._intake, self.speculator, self.tracer)
        if self.config.simulate_acceptance is not None:
            logger.warning(
                "SIMULATED acceptance %g: drafted tokens are accepted by chance, the text means nothing",
                self.config.simulate_acceptance,
            )

    @property
    def engine_plan(self) -> EnginePlan:
        """The plan that was made for the latest job."""
        return self.planner.engine_plan

    @property
    def policy(self) -> Policy:
        """The policy that was chosen for the latest job."""
        return self.engine_plan.policy

    @property
    def statistics(self) -> Statistics:
        """The statistics of all runs so far."""
        return self._loop.statistics

    @property
    def prediction(self) -> dict[str, Any]:
        """Predicted against measured, of the last run that had a plan."""
        return self._loop.prediction

    @property
    def replans(self) -> list[str]:
        """Why settings were changed between passes, of all runs."""
        return self._loop.replans

    @property
    def runner(self) -> Runner | None:
        """What runs passes; None before the first job, and after a failure."""
        return self._capacity.runner

    # Jobs

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where no SamplingParams are given: the model's generation_config.json, read as transformers reads
        it. Greedy, unless the file says
        ``"do_sample": true`` or names a temperature. `dataclasses.replace` changes some of it. Raises
        ConfigurationError for what cannot be followed."""
        return self.generation.params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        on_finished: Callable[[Completion], None] | None = None,
        *,
        on_prompt: Callable[[int, Completion], None] | None = None,
        first_index: int = 0,
    ) -> list[Completion]:
        """Complete one prompt or several (text, token ids or chat messages); one SamplingParams for all or one each.
        Results in the order of the prompts.

        Without SamplingParams those of `get_default_sampling_params` hold; with them, nothing of the model's
        generation_config.json but its EOS tokens. ``on_finished`` is called with every completion as it ends, in any
        order; ``on_prompt`` with every prompt's index and its completion, all samples in it, when the last of them
        ends. ``first_index`` is the index of the first prompt, so that the rest of a job draws the tokens that it
        would have drawn. Raises PromptError for the first prompt that cannot be run, before anything is generated;
        EngineBusyError while a stream is open, or in a callback of this engine. It waits for a call in another
        thread. A prompt that fails on the way, as the model's logits are no finite numbers or every token is barred,
        has a completion with ``finish_reason`` "error" and the rest goes on.
        """
        with self._turns.whole("generate"):
            self._intake.check_empty("generate")
            requests = requests_of(prompts, sampling_params, self._intake.encoder, self._intake.defaults, first_index)
            if self.config.compare_plain and self.speculator is not None:
                run = self._loop.compared(requests, self.speculator)
            else:
                run = self._loop.completions(requests, self.speculator)
            results: dict[int, Completion] = {}
            # Closed with the loop, however that ends: its error would keep a run alive, and the pages of its sequences.
            with contextlib.closing(run) as completions:
                for request, completion in completions:
                    whole = self._intake.deliver(completion, request)
                    if on_finished is not None:
                        on_finished(completion)
                    if whole is not None:
                        results[request.index] = whole[1]
                        if on_prompt is not None:
                            on_prompt(request.index, whole[1])
            return [results[index] for index in sorted(results)]

    def prepare(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> None:
        """Allocate what a job of these prompts needs (cache, staging, buffers), as `generate` would at its start:
        outside of a measurement, say."""
        with self._turns.whole("prepare"):
            self._intake.check_empty("prepare")
            requests = requests_of(prompts, sampling_params, self._intake.encoder, self._intake.defaults)
            self._capacity.prepare(self._loop.job(requests))

    def stream(
        self, items: Iterable[Item], on_tokens: Callable[[Hashable, str], None] | None = None
    ) -> Iterator[tuple[Hashable, Completion]]:
        """Complete (key, prompt, params) items, or (key, prompt, params, source), as they come; yields (key,
        completion) as sequences finish, in any order. Answers of one source are expected to be of like lengths.

        Items are drawn about a block ahead, in a thread of their own, so that one that is slow to come holds up no
        sequence in flight. An item that cannot be run yields a completion with ``finish_reason`` "error" and the rest
        goes on. ``on_tokens(key, new_text)`` is called after every pass with text of the item's first sample that
        will not change any more. The engine belongs to the stream from its first item until its end, or its close():
        other calls raise EngineBusyError. If the engine is closed before, the stream raises EngineClosedError.
        """
        self._turns.check_open("stream")
        return self._turns.stream(self._stream(items, on_tokens))

    def _stream(
        self, items: Iterable[Item], on_tokens: Callable[[Hashable, str], None] | None
    ) -> Generator[tuple[Hashable, Completion], None, None]:
        self._intake.check_empty("stream")
        numbers = count()
        with contextlib.closing(Feed(items, self._turns.helper)) as feed, self._loop.ending():
            while True:
                limit = self.policy.block_size if self._loop.running else PEEKED_BLOCKS * self.policy.block_size
                for item in feed.take(limit - self._intake.num_waiting, wait=not self._intake):
                    refused = self._intake.add_item(next(numbers), item, on_tokens)
                    if refused is not None:
                        yield refused
                if self._intake:
                    yield from self._loop.step(complete=feed.ended)
                elif feed.ended:
                    return

    # One request, one pass at a time

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: Hashable = None,
        on_text: OnText | None = None,
    ) -> Hashable:
        """Let a prompt wait for `step`; returns its id, a number where None is given. May be called at any time, also
        by ``on_text``, which is told of the new text of its first sample after every pass.

        Raises PromptError for a prompt that cannot be run, ConfigurationError for an id that is still in use,
        EngineBusyError while a stream is open.
        """
        with self._turns.change("add_request"):
            return self._intake.add_named(request_id, prompt, sampling_params, on_text)

    def step(self) -> list[tuple[Hashable, Completion]]:
        """Run one pass over the requests that were added; returns (id, completion) of those that finished. A request
        that cannot go on has ``finish_reason`` "error". An error of the pass itself ends all of them."""
        with self._turns.step():
            try:
                return self._loop.step(complete=False) if self._intake else []
            finally:
                if not self._intake:
                    self._loop.end()

    def abort(self, request_id: Hashable) -> bool:
        """Give up a request that waits or runs: its pages are free at once, and nothing comes of it. Others go on.
        Returns whether there was one."""
        with self._turns.change("abort"):
            dropped = self._intake.drop(request_id)
            self._loop.abort(lambda sequence: sequence.request.index in dropped)
            return bool(dropped)

    def has_unfinished(self) -> bool:
        """Whether requests that were added wait or run."""
        self._turns.check_open("has_unfinished")
        return len(self._intake) > 0

    # Report and end

    def report(self) -> dict[str, Any]:
        """Plan, realised placement, throughput and bytes per resource of what was run so far."""
        self._turns.check_open("report")
        report = {
            **self.engine_plan.describe(),
            **describe_memory(self.engine_plan, self.runner, self.tiers, self.speculator),
            **self._loaded.describe(),
            **self._loop.describe(),
            "resources": {name: asdict(use) for name, use in self.tracer.summary().items()},
        }
        if self._loop.job_record is not None:
            report["job"] = self._loop.job_record.describe(self.planner.known_hardware)
        if self.prediction:
            report["prediction"] = {**self.prediction, "replans": list(self.replans)}
        if self.speculator is not None:
            report["speculation"] = {**self.speculator.report(), **self._loop.comparison.describe()}
        return report

    def close(self) -> None:
        """Free pinned memory, threads and files; a stream that is open ends. Closing again does nothing.

        Waits for a call in another thread. Raises EngineBusyError in a callback of this engine."""
        if self._turns.closed:
            return
        with self._turns.closing() as stream, self._stack as stack:
            # Whatever of it fails, the rest is closed all the same.
            stack.callback(self._capacity.close)
            stack.callback(self._loop.drop_all)
            if stream is not None:
                stack.callback(stream.close)

    def __enter__(self) -> LLM:
        self._turns.check_open("with")
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
