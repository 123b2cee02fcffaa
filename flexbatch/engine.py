"""The engine: load a model over the tiers, run jobs through it, give results in order."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from flexbatch import adapting, growing
from flexbatch.block import Block, make_block
from flexbatch.choosing import overshoot
from flexbatch.config import ConfigurationError, EngineConfig
from flexbatch.deciding import Decisions
from flexbatch.execution.batcher import Batcher, Candidate, Retired
from flexbatch.execution.sampler import draw
from flexbatch.intake import Gathering, Intake, Item, candidates_of, requests_of
from flexbatch.loaded import load_model
from flexbatch.memory.tiers import Tiers, check_budgets
from flexbatch.memory.transfer import Lanes
from flexbatch.memory.weights import WeightStore
from flexbatch.models.arch import Arch
from flexbatch.planning import Job
from flexbatch.policy.replan import Replan
from flexbatch.policy.types import Policy
from flexbatch.prompts import Prompt
from flexbatch.reports import Statistics, against_plain, completion_of, report_text
from flexbatch.request import Completion, Request, SamplingParams
from flexbatch.speculative.speculator import Speculator
from flexbatch.trace import RecordingTracer, Tracer

logger = logging.getLogger("flexbatch")

PEEKED_BLOCKS = 4
"""Blocks of requests that `stream` looks ahead to size the cache, when the job's lengths are not known."""


class LLM:
    """A model whose weights, KV cache and activations are spread over GPU, CPU and disk.

    Keywords are the fields of `EngineConfig`; what is None is chosen. Use as a context manager, or call `close`: it frees pinned memory, threads, files.
    Raises ConfigurationError for wrong settings, DoesNotFitError when the budgets are short (before anything is loaded), CheckpointError for a bad model.
    """

    def __init__(self, model: str = "demo", *, trace: bool = False, **settings: Any) -> None:
        for name in ("percent", "draft", "allow_bits"):
            if isinstance(settings.get(name), list):
                settings[name] = tuple(settings[name])
        self._start(Decisions(EngineConfig(model=model, **settings)), trace)

    @classmethod
    def from_config(cls, config: EngineConfig, trace: bool = False, job: Job | None = None) -> LLM:
        """An engine from a ready configuration; ``job`` tells the planner what will be run."""
        return cls.from_decisions(Decisions(config, job), trace)

    @classmethod
    def from_decisions(cls, decided: Decisions, trace: bool = False) -> LLM:
        """An engine as decided."""
        engine = cls.__new__(cls)
        engine._start(decided, trace)
        return engine

    @classmethod
    def plan(cls, config: EngineConfig, job: Job) -> dict[str, Any]:
        """What `from_config` and running the job would put where, without loading anything: the first part of `report`, and the `Plan` as "plan".

        With a named machine (--hardware) and the default device, it is planned for that machine and its memory; nothing is measured.
        Raises DoesNotFitError when the job does not fit the budgets.
        """
        return Decisions(config, job, dry=True).describe_plan(job)

    def _start(self, decided: Decisions, trace: bool) -> None:
        self.decided, self.config = decided, decided.config
        self.statistics = Statistics()
        self.plain_statistics = Statistics()
        """Of the runs without speculation that --compare-plain asks for."""
        self.block: Block | None = None
        self.prediction: dict[str, Any] = {}
        """Predicted against measured, of the last run that had a plan."""
        self.replans: list[str] = []
        device = decided.device
        self.tracer: Tracer = RecordingTracer(device) if trace else adapting.UsageTracer(device) if decided.plan is not None else Tracer()
        self._stack = contextlib.ExitStack()
        try:
            self._loaded = load_model(decided, self.tracer, self._stack)
        except BaseException:
            self._stack.close()
            raise
        if self.config.simulate_acceptance is not None:
            logger.warning("SIMULATED acceptance %g: drafted tokens are accepted by chance, the text means nothing", self.config.simulate_acceptance)

    @property
    def policy(self) -> Policy:
        """As decided for the latest job."""
        return self.decided.policy

    @property
    def arch(self) -> Arch:
        return self.decided.arch

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; None for dummy weights."""
        return self.decided.tokenizer

    @property
    def tiers(self) -> Tiers:
        return self._loaded.tiers

    @property
    def lanes(self) -> Lanes:
        return self._loaded.lanes

    @property
    def weights(self) -> WeightStore:
        return self._loaded.weights

    @property
    def speculator(self) -> Speculator | None:
        """None without a draft."""
        return self._loaded.speculator

    # Jobs

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_finished: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or several (text, token ids or chat messages); one SamplingParams for all or one each. Results in the order of the prompts.

        ``on_finished`` is called with every completion as it ends, in any order.
        Raises PromptError for the first prompt that cannot be run, before anything is generated.
        """
        requests = requests_of(prompts, sampling_params, self.decided.encoder)
        job = self._job(requests)
        if self.config.compare_plain and self.speculator is not None:
            self._run_plainly(requests, job)
        gathering, results = Gathering(), {}
        for request, completion in self._run(requests, job):
            if completion.error:
                raise ConfigurationError(f"prompt {request.index}: {completion.error}")
            if on_finished is not None:
                on_finished(completion)
            whole = gathering.add(request, completion)
            if whole is not None:
                results[request.index] = whole
        return [results[index] for index in sorted(results)]

    def prepare(self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None) -> None:
        """Allocate what a job of these prompts needs (cache, staging, buffers), as `generate` would at its start: outside of a measurement, say."""
        self._prepare(self._job(requests_of(prompts, sampling_params, self.decided.encoder)))

    def stream(self, items: Iterable[Item], on_tokens: Callable[[Hashable, str], None] | None = None) -> Iterator[tuple[Hashable, Completion]]:
        """Complete (key, prompt, params) items as they come; yields (key, completion) as sequences finish, in any order.

        Items are pulled whenever the block has room, so it never drains between them. An item that cannot be run yields a completion with
        ``finish_reason`` "error" and the rest goes on. ``on_tokens(key, new_text)`` is called after every pass with text of the item's first sample
        that will not change any more.
        """
        intake = Intake(items, self.decided.encoder)
        source = intake.requests()
        peeked = list(itertools.islice(source, PEEKED_BLOCKS * self.policy.block_size))
        if peeked:
            job = growing.holdable(self._job(peeked), self.decided.exceeded)
            report = (lambda index, text: on_tokens(intake.key(index), text)) if on_tokens else None
            for request, completion in self._run(itertools.chain(peeked, source), job, report):
                yield from intake.finished(request, completion)
        yield from intake.take_failed()

    def _run_plainly(self, requests: Sequence[Request], job: Job) -> None:
        """The same job without speculation, for the report alone. Neither run finds prompts in the cache that an earlier one has read."""
        statistics, self.statistics = self.statistics, self.plain_statistics
        try:
            self._prepare(job).cache.forget_prefixes()
            for _ in self._run(requests, job, speculate=False):
                pass
            self._prepare(job).cache.forget_prefixes()
        finally:
            self.plain_statistics, self.statistics = self.statistics, statistics

    def _job(self, requests: Iterable[Request]) -> Job:
        return Job.of(((len(request.prompt_token_ids), request.params.max_tokens) for request in requests), self.arch.max_positions)

    def _prepare(self, job: Job) -> Block:
        """A block whose sizes suit the job."""
        decided = self.decided
        decided.suit(job)
        sizes = decided.sizes(job)
        if decided.speculation is not None and self.speculator is not None:
            check_budgets(decided.needs(sizes), decided.budgets)
            decided.speculation.open_block(self.speculator, sizes.sequence_tokens)
        if self.block is not None and self.block.suits(self.policy, sizes) and self._reach(sizes.longest):
            return self.block
        self._close_block()
        check_budgets(decided.needs(sizes), decided.budgets)
        self.block = make_block(decided, sizes, self.weights, self.tiers, self.lanes)
        return self.block

    def _reach(self, longest: int) -> bool:
        """Whether the block takes sequences of so many tokens: where its pages do and its tables do not, these grow, as far as the budgets go."""
        assert self.block is not None
        if longest <= self.block.sizes.longest:
            return True
        sizes = replace(self.block.sizes, longest=longest)
        if overshoot(self.decided.needs(sizes), self.decided.budgets):
            return False
        self.block.reach(sizes)
        return True

    @torch.inference_mode()
    def _run(
        self, requests: Iterable[Request], job: Job, on_tokens: Callable[[int, str], None] | None = None, speculate: bool = True
    ) -> Iterator[tuple[Request, Completion]]:
        """All requests, in one block; in a larger one from where a request is longer than ``job`` said and has outgrown it."""
        candidates = candidates_of(requests, self.tokenizer, self.arch, self.config.seed)
        proposer = self.speculator if speculate else None
        block = self._prepare(job)
        while True:
            batcher = Batcher(self.policy, block.cache, candidates, block.sizes.max_micro_batch_tokens, proposer, self._refusal, self._reach)
            yield from self._run_block(block, batcher, proposer, on_tokens)
            if not batcher.outgrown:
                return
            job, candidates = growing.look_ahead(batcher.remaining(), PEEKED_BLOCKS * self.policy.block_size)
            block = growing.prepared(self._prepare, growing.holdable(job, self.decided.exceeded))
            logger.info("made a larger block: a request was longer than those that the stream began with")

    def _refusal(self, candidate: Candidate) -> str:
        return growing.refusal(candidate, self.decided.exceeded, self.decided.budgets)

    def _run_block(
        self, block: Block, batcher: Batcher, proposer: Speculator | None, on_tokens: Callable[[int, str], None] | None
    ) -> Iterator[tuple[Request, Completion]]:
        """The loop of the engine: compose a pass, run it, commit what it drew."""
        meter, generated = self._meter(), self.statistics.generated_tokens
        shown: dict[int, int] = {}
        started = time.perf_counter()
        try:
            while batcher.has_work():
                begun = time.perf_counter()
                self.tracer.begin_pass()
                work = batcher.next_pass()
                logits = block.executor.run(work)
                load = None if meter is None else meter.load(work)
                batcher.commit(work, draw(logits, proposer))
                self.statistics.passes += 1
                if meter is not None and load is not None and (change := meter.record(load, time.perf_counter() - begun)) is not None:
                    self._adjust(batcher, block, change)
                self.statistics.prefilled_tokens += work.num_prompt_tokens
                if on_tokens is not None:
                    report_text(batcher, shown, on_tokens)
                for retired in batcher.take_retired():
                    yield retired.state.request, self._completion(retired)
            for retired in batcher.take_retired():
                yield retired.state.request, self._completion(retired)
        except GeneratorExit:
            raise
        except BaseException:
            # What was on its way may have failed half-way: no later job may find it in the cache, nor wait for it.
            self._close_block()
            raise
        finally:
            batcher.abort()
            self.weights.drain()
            seconds = time.perf_counter() - started
            self.statistics.seconds += seconds
            self.statistics.moved_bytes = self.lanes.moved_bytes()
            if meter is not None:
                self.prediction = meter.report((self.statistics.generated_tokens - generated) / seconds)
                if self.decided.profile_path is not None and meter.passes:
                    self.decided.recalibrate(meter.recalibrated(self.decided.hardware))
                    logger.info("recalibrated the machine's profile by %d passes -> %s", meter.passes, self.decided.profile_path)

    def _meter(self) -> adapting.PassMeter | None:
        """Compares the passes of a run with its plan; None where nothing was planned, or drafts change what a pass is."""
        if self.decided.plan is None or self.speculator is not None:
            return None
        return adapting.PassMeter(self.decided.plan, adapting.BusySeconds(self.tracer))

    def _adjust(self, batcher: Batcher, block: Block, change: Replan) -> None:
        """Settings that may change between passes. Without buffers for CPU attention there is none, whatever the re-plan says."""
        share = change.cpu_attention if block.sizes.max_cpu_attention_tokens else 0.0
        batcher.adjust(change.admission_limit, change.prefill_budget, share)
        logger.info("re-planned: %s", change.reason)
        self.replans.append(change.reason)

    def _completion(self, retired: Retired) -> Completion:
        self.statistics.count(retired)
        return completion_of(retired)

    # Report and end

    def report(self) -> dict[str, Any]:
        """Plan, realised placement, throughput and bytes per resource of what was run so far."""
        decided, block, tiers, speculator = self.decided, self.block, self.tiers, self.speculator
        report = {
            **decided.describe(),
            "realized_percent": {
                "weights": decided.weight_plan.realized_percent,
                "cache": block.cache.realized_percent if block else {},
                "activations": block.activations.realized_percent if block else {},
            },
            "memory": [asdict(need) for need in decided.needs(block.sizes)] if block else [],
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
            report["speculation"] = {**speculator.report(), **against_plain(self.statistics, self.plain_statistics)}
        return report

    def _close_block(self) -> None:
        if self.block is not None:
            self.block.close()
            self.block = None

    def close(self) -> None:
        """Free pinned memory, threads and files."""
        self._close_block()
        self._stack.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
