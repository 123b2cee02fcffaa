"""The engine: load a model over the tiers, run jobs through it, give results in order."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import traceback
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from flexbatch.config import EngineConfig
from flexbatch.execution.batcher import Batcher, Candidate, Retired
from flexbatch.execution.block_sizes import logits_chunk_bytes
from flexbatch.execution.diagnosis import explained
from flexbatch.execution.runner import Runner, open_runner
from flexbatch.execution.sampler import draw
from flexbatch.execution.turns import Turns
from flexbatch.intake import Defaults, Gathering, Intake, Item, Params, candidates_of, requests_of
from flexbatch.job import Job
from flexbatch.loader import load_model
from flexbatch.memory.tiers import Tiers, check_budgets
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.models.arch import Arch
from flexbatch.models.generation_config import GenerationDefaults
from flexbatch.planner import monitor
from flexbatch.planner.choose import overshoot
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.oversize import holdable, look_ahead, prepared, refusal
from flexbatch.planner.report import Statistics, against_baseline, completion_of, report_text
from flexbatch.policy.policy import Policy
from flexbatch.policy.replan import Replan
from flexbatch.request import Completion, Request, SamplingParams
from flexbatch.speculative.speculator import Speculator
from flexbatch.text.prompts import Prompt
from flexbatch.trace import RecordingTracer, Tracer
from flexbatch.validation.checks import check_keywords
from flexbatch.validation.errors import ConfigurationError

logger = logging.getLogger("flexbatch")

PEEKED_BLOCKS = 4
"""Blocks of requests that `stream` looks ahead to size the cache, when the job's lengths are not known."""

LOGGED_FAILURES = 3


class LLM:
    """A model whose weights, KV cache and activations are spread over GPU, CPU and disk.

    Keywords are the fields of `EngineConfig`; what is None is chosen. Use as a context manager, or call `close`: it
    frees pinned memory, threads, files. Raises ConfigurationError for wrong settings, DoesNotFitError when the
    budgets are short (before anything is loaded), CheckpointError for a bad model.
    """

    def __init__(self, model: str = "demo", *, trace: bool = False, **settings: Any) -> None:
        check_keywords("LLM", settings, ["trace", *EngineConfig.__dataclass_fields__])
        self._start(EnginePlan(EngineConfig(model=model, **settings)), trace)

    @classmethod
    def from_config(cls, config: EngineConfig, trace: bool = False, job: Job | None = None) -> LLM:
        """An engine from a ready configuration; ``job`` tells the planner what will be run."""
        return cls.from_engine_plan(EnginePlan(config, job), trace)

    @classmethod
    def from_engine_plan(cls, engine_plan: EnginePlan, trace: bool = False) -> LLM:
        """An engine as decided."""
        engine = cls.__new__(cls)
        engine._start(engine_plan, trace)
        return engine

    @classmethod
    def plan(cls, config: EngineConfig, job: Job) -> dict[str, Any]:
        """What `from_config` and running the job would put where, without loading anything: the first part of `report`,
        and the `Plan` as "plan".

        With a named machine (--hardware) and the default device, it is planned for that machine and its memory;
        nothing is measured. Raises DoesNotFitError when the job does not fit the budgets.
        """
        return EnginePlan(config, job, dry=True).describe_plan(job)

    def _start(self, engine_plan: EnginePlan, trace: bool) -> None:
        self.engine_plan, self.config = engine_plan, engine_plan.config
        self._defaults = Defaults(engine_plan.generation)
        self._num_failed = 0
        self.statistics = Statistics()
        self.baseline_statistics = Statistics()
        """Of the runs without speculation that --compare-plain asks for."""
        self.runner: Runner | None = None
        self.prediction: dict[str, Any] = {}
        """Predicted against measured, of the last run that had a plan."""
        self.replans: list[str] = []
        device = engine_plan.device
        self.tracer: Tracer = (
            RecordingTracer(device)
            if trace
            else monitor.UsageTracer(device)
            if engine_plan.plan is not None
            else Tracer()
        )
        self._turns = Turns()
        self._stack = contextlib.ExitStack()
        try:
            self._loaded = load_model(engine_plan, self.tracer, self._stack)
        except BaseException as error:
            self._stack.close()
            # The frames of the error hold what was loaded for as long as it is handled, and longer at a prompt.
            traceback.clear_frames(error.__traceback__)
            raise
        if self.config.simulate_acceptance is not None:
            logger.warning(
                "SIMULATED acceptance %g: drafted tokens are accepted by chance, the text means nothing",
                self.config.simulate_acceptance,
            )

    @property
    def policy(self) -> Policy:
        """As decided for the latest job."""
        return self.engine_plan.policy

    @property
    def arch(self) -> Arch:
        return self.engine_plan.arch

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; None for dummy weights."""
        return self.engine_plan.tokenizer

    @property
    def tiers(self) -> Tiers:
        return self._loaded.tiers

    @property
    def queues(self) -> TransferQueues:
        return self._loaded.queues

    @property
    def weights(self) -> WeightStore:
        return self._loaded.weights

    @property
    def generation(self) -> GenerationDefaults:
        """What the model's generation_config.json says."""
        return self.engine_plan.generation

    @property
    def speculator(self) -> Speculator | None:
        """None without a draft."""
        return self._loaded.speculator

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
            return self._generate(prompts, sampling_params, on_finished, on_prompt, first_index)

    def _generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params,
        on_finished: Callable[[Completion], None] | None,
        on_prompt: Callable[[int, Completion], None] | None,
        first_index: int,
    ) -> list[Completion]:
        requests = requests_of(prompts, sampling_params, self.engine_plan.encoder, self._defaults, first_index)
        job = self._job(requests)
        if self.config.compare_plain and self.speculator is not None:
            self._run_baseline(requests, job)
        gathering, results = Gathering(), {}
        # Closed with the loop, however that ends: its error would keep a run alive, and the pages of its sequences.
        with contextlib.closing(self._run(requests, job)) as run:
            for retired in run:
                request, completion = retired.state.request, completion_of(retired)
                if retired.refused:
                    raise ConfigurationError(completion.error)
                if on_finished is not None:
                    on_finished(completion)
                whole = gathering.add(request, completion)
                if whole is not None:
                    results[request.index] = whole
                    if on_prompt is not None:
                        on_prompt(request.index, whole)
        return [results[index] for index in sorted(results)]

    def prepare(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> None:
        """Allocate what a job of these prompts needs (cache, staging, buffers), as `generate` would at its start:
        outside of a measurement, say."""
        with self._turns.whole("prepare"):
            self._prepare(self._job(requests_of(prompts, sampling_params, self.engine_plan.encoder, self._defaults)))

    def stream(
        self, items: Iterable[Item], on_tokens: Callable[[Hashable, str], None] | None = None
    ) -> Iterator[tuple[Hashable, Completion]]:
        """Complete (key, prompt, params) items as they come; yields (key, completion) as sequences finish, in any
        order.

        Items are pulled whenever the block has room, so it never drains between them. An item that cannot be run
        yields a completion with ``finish_reason`` "error" and the rest goes on. ``on_tokens(key, new_text)`` is
        called after every pass with text of the item's first sample that will not change any more. The engine
        belongs to the stream from its first item until its end, or its close(): other calls raise EngineBusyError.
        If the engine is closed before, the stream raises EngineClosedError.
        """
        self._turns.check_open("stream")
        return self._turns.stream(self._stream(items, on_tokens))

    def _stream(
        self, items: Iterable[Item], on_tokens: Callable[[Hashable, str], None] | None
    ) -> Generator[tuple[Hashable, Completion], None, None]:
        intake = Intake(items, self.engine_plan.encoder, self._defaults)
        source = intake.requests()
        peeked = list(itertools.islice(source, PEEKED_BLOCKS * self.policy.block_size))
        if peeked:
            job = holdable(self._job(peeked), self.engine_plan.exceeded)
            report = (lambda index, text: on_tokens(intake.key(index), text)) if on_tokens else None
            with contextlib.closing(self._run(itertools.chain(peeked, source), job, report)) as run:
                for retired in run:
                    yield from intake.finished(retired.state.request, completion_of(retired))
        yield from intake.take_failed()

    def _run_baseline(self, requests: Sequence[Request], job: Job) -> None:
        """The same job without speculation, for the report alone. Neither run finds prompts in the cache that an
        earlier one has read."""
        statistics, self.statistics = self.statistics, self.baseline_statistics
        try:
            self._prepare(job).cache.forget_prefixes()
            with contextlib.closing(self._run(requests, job, speculate=False)) as run:
                for _ in run:
                    pass
            self._prepare(job).cache.forget_prefixes()
        finally:
            self.baseline_statistics, self.statistics = self.statistics, statistics

    def _job(self, requests: Iterable[Request]) -> Job:
        context = self.arch.max_positions
        pairs = ((len(request.prompt_token_ids), request.params) for request in requests)
        return Job.of(((prompt, params.tokens_within(context - prompt)) for prompt, params in pairs), context)

    def _prepare(self, job: Job) -> Runner:
        """A block whose sizes suit the job."""
        engine_plan = self.engine_plan
        engine_plan.suit(job)
        sizes = engine_plan.sizes(job)
        if engine_plan.speculation is not None and self.speculator is not None:
            check_budgets(engine_plan.needs(sizes), engine_plan.budgets)
            engine_plan.speculation.open_runner(self.speculator, sizes.sequence_tokens)
        if self.runner is not None and self.runner.holds(self.policy, sizes) and self._reach(sizes.longest):
            return self.runner
        self._close_runner()
        check_budgets(engine_plan.needs(sizes), engine_plan.budgets)
        self.runner = open_runner(
            self.arch,
            self.weights,
            engine_plan.layout,
            self.policy,
            sizes,
            self.tiers,
            self.queues,
            logits_chunk_bytes(self.arch, self.policy, sizes.max_query_nodes),
            engine_plan.num_graphs(sizes),
        )
        return self.runner

    def _reach(self, longest: int) -> bool:
        """Whether the block takes sequences of so many tokens: where its pages do and its tables do not, these grow,
        as far as the budgets go."""
        assert self.runner is not None
        if longest <= self.runner.sizes.longest:
            return True
        sizes = replace(self.runner.sizes, longest=longest)
        if overshoot(self.engine_plan.needs(sizes), self.engine_plan.budgets):
            return False
        self.runner.reach(sizes)
        return True

    @torch.inference_mode()
    def _run(
        self,
        requests: Iterable[Request],
        job: Job,
        on_tokens: Callable[[int, str], None] | None = None,
        speculate: bool = True,
    ) -> Generator[Retired, None, None]:
        """All requests, in one block; in a larger one from where a request is longer than ``job`` said and has
        outgrown it."""
        candidates = candidates_of(requests, self.tokenizer, self.arch, self.config.seed)
        proposer = self.speculator if speculate else None
        runner = self._prepare(job)
        while True:
            batcher = Batcher(
                self.policy,
                runner.cache,
                candidates,
                runner.sizes.max_micro_batch_tokens,
                proposer,
                self._refusal,
                self._reach,
            )
            yield from self._run_block(runner, batcher, proposer, on_tokens)
            if not batcher.outgrown:
                return
            job, candidates = look_ahead(batcher.remaining(), PEEKED_BLOCKS * self.policy.block_size)
            runner = prepared(self._prepare, holdable(job, self.engine_plan.exceeded))
            logger.info("made a larger block: a request was longer than those that the stream began with")

    def _refusal(self, candidate: Candidate) -> str:
        return refusal(candidate, self.engine_plan.exceeded, self.engine_plan.budgets)

    def _run_block(
        self,
        runner: Runner,
        batcher: Batcher,
        proposer: Speculator | None,
        on_tokens: Callable[[int, str], None] | None,
    ) -> Iterator[Retired]:
        """The loop of the engine: compose a pass, run it, commit what it drew."""
        meter, generated = self._meter(), self.statistics.generated_tokens
        started = time.perf_counter()
        try:
            while batcher.has_work():
                begun = time.perf_counter()
                self.tracer.begin_pass()
                work = batcher.next_pass()
                logits = runner.executor.run(work)
                load = None if meter is None else meter.load(work)
                batcher.commit(work, draw(logits, proposer))
                self.statistics.passes += 1
                if (
                    meter is not None
                    and load is not None
                    and (change := meter.record(load, time.perf_counter() - begun)) is not None
                ):
                    self._adjust(batcher, runner, change)
                self.statistics.prefilled_tokens += work.num_prompt_tokens
                if on_tokens is not None:
                    report_text(batcher, on_tokens)
                yield from self._taken(batcher, runner)
            yield from self._taken(batcher, runner)
        except GeneratorExit:
            raise
        except BaseException as error:
            # What was on its way may have failed half-way: no later job may find it in the cache, nor wait for it.
            self._close_runner()
            if proposer is not None:
                proposer.forget()
            if isinstance(error, MemoryError | torch.OutOfMemoryError):
                # The frames of the error hold what filled the memory for as long as it is handled.
                traceback.clear_frames(error.__traceback__)
            raise
        finally:
            batcher.abort()
            self.weights.drain()
            seconds = time.perf_counter() - started
            self.statistics.seconds += seconds
            self.statistics.moved_bytes = self.queues.moved_bytes()
            if meter is not None:
                self.prediction = meter.report((self.statistics.generated_tokens - generated) / seconds)
                if self.engine_plan.profile_path is not None and meter.passes:
                    self.engine_plan.recalibrate(meter.recalibrated(self.engine_plan.hardware))
                    logger.info(
                        "recalibrated the machine's profile by %d passes -> %s",
                        meter.passes,
                        self.engine_plan.profile_path,
                    )

    def _meter(self) -> monitor.PassMeter | None:
        """Compares the passes of a run with its plan; None where nothing was planned, or drafts change what a pass
        is."""
        if self.engine_plan.plan is None or self.speculator is not None:
            return None
        return monitor.PassMeter(self.engine_plan.plan, monitor.BusySeconds(self.tracer))

    def _adjust(self, batcher: Batcher, runner: Runner, change: Replan) -> None:
        """Settings that may change between passes. Without buffers for CPU attention there is none, whatever the
        re-plan says."""
        share = change.cpu_attention if runner.sizes.max_cpu_attention_tokens else 0.0
        batcher.adjust(change.admission_limit, change.prefill_budget, share)
        logger.info("re-planned: %s", change.reason)
        self.replans.append(change.reason)

    def _taken(self, batcher: Batcher, runner: Runner) -> Iterator[Retired]:
        """What has ended since the last time, counted; failures say in the log, too, why."""
        for retired in explained(batcher.take_retired(), batcher, runner.executor):
            self.statistics.count(retired)
            if retired.error and not retired.refused:
                self._num_failed += 1
                if self._num_failed <= LOGGED_FAILURES:
                    more = (
                        "; more failures are only in their completions" if self._num_failed == LOGGED_FAILURES else ""
                    )
                    logger.error("%s%s", completion_of(retired).error, more)
            yield retired

    # Report and end

    def report(self) -> dict[str, Any]:
        """Plan, realised placement, throughput and bytes per resource of what was run so far."""
        self._turns.check_open("report")
        engine_plan, runner, tiers, speculator = self.engine_plan, self.runner, self.tiers, self.speculator
        report = {
            **engine_plan.describe(),
            "realized_percent": {
                "weights": engine_plan.weight_plan.realized_percent,
                "cache": runner.cache.realized_percent if runner else {},
                "activations": runner.activations.realized_percent if runner else {},
            },
            "memory": [asdict(need) for need in engine_plan.needs(runner.sizes)] if runner else [],
            "peak_bytes": {
                "gpu": tiers.gpu.peak_bytes + (speculator.peak_bytes if speculator is not None else 0),
                "cpu": tiers.cpu.peak_bytes,
                "disk": tiers.disk.peak_bytes,
            },
            "load_seconds": self._loaded.seconds,
            "loaded_bytes": self._loaded.loaded_bytes,
            "reused_bytes": self._loaded.reused_bytes,
            **self.statistics.describe(),
            "resources": {name: asdict(use) for name, use in self.tracer.summary().items()},
        }
        if self.prediction:
            report["prediction"] = {**self.prediction, "replans": list(self.replans)}
        if speculator is not None:
            report["speculation"] = {
                **speculator.report(),
                **against_baseline(self.statistics, self.baseline_statistics),
            }
        return report

    def _close_runner(self) -> None:
        runner, self.runner = self.runner, None
        if runner is not None:
            runner.close()

    def close(self) -> None:
        """Free pinned memory, threads and files; a stream that is open ends. Closing again does nothing.

        Waits for a call in another thread. Raises EngineBusyError in a callback of this engine.
        """
        if self._turns.closed:
            return
        with self._turns.closing() as stream, self._stack as stack:
            # Whatever of it fails, the rest is closed all the same.
            stack.callback(self._close_runner)
            if stream is not None:
                stack.callback(stream.close)

    def __enter__(self) -> LLM:
        self._turns.check_open("with")
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
