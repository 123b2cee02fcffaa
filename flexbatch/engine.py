"""The engine: load a model over the tiers, run jobs through it, give results in order."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch

from flexbatch import adapting, growing
from flexbatch.block import Block, make_block
from flexbatch.config import ConfigurationError, EngineConfig
from flexbatch.deciding import Decisions
from flexbatch.detokenize import OutputText
from flexbatch.execution.batcher import Batcher, Candidate, Retired
from flexbatch.execution.request_state import RequestState
from flexbatch.execution.sampler import draw
from flexbatch.memory.loading import Loader
from flexbatch.memory.tiers import Pool, Tiers, check_budgets, prepare_offload_dir
from flexbatch.memory.transfer import Lanes
from flexbatch.memory.weights import WeightStore
from flexbatch.models import checkpoint, resolve
from flexbatch.models.arch import Arch
from flexbatch.models.checkpoint import Piece, QuantizedPiece
from flexbatch.models.dummy import dummy
from flexbatch.planning import Job
from flexbatch.policy.replan import Replan
from flexbatch.policy.types import Policy
from flexbatch.prompts import Prompt
from flexbatch.reports import Statistics, against_plain, completion_of, report_text, with_samples
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
        self.speculator: Speculator | None = None
        self.prediction: dict[str, Any] = {}
        """Predicted against measured, of the last run that had a plan."""
        self.replans: list[str] = []
        device = decided.device
        self.tracer: Tracer = RecordingTracer(device) if trace else adapting.UsageTracer(device) if decided.plan is not None else Tracer()
        self._stack = contextlib.ExitStack()
        try:
            self._load()
        except BaseException:
            self._stack.close()
            raise

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

    def _load(self) -> None:
        """Weights to their homes."""
        started = time.perf_counter()
        decided, config = self.decided, self.config
        offload_dir, budgets = decided.offload_dir, decided.budgets
        uses_disk = any(split.disk > 0 for split in (self.policy.weights, self.policy.cache, self.policy.activations))
        if uses_disk or config.offload_path is not None:
            prepare_offload_dir(offload_dir)
        self.tiers = Tiers(
            gpu=Pool("gpu", budgets["gpu"], device=decided.device),
            cpu=Pool("cpu", budgets["cpu"], pinned=decided.device.type == "cuda"),
            disk=Pool("disk", budgets["disk"]),
            offload_dir=offload_dir,
        )
        self._stack.callback(self.tiers.close)
        self.lanes = Lanes(decided.device, self.tracer)
        self._stack.callback(self.lanes.close)
        self.weights = WeightStore(decided.weight_plan, self.tiers, self.lanes, decided.dtype)
        self._stack.callback(self.weights.close)
        identity = f"dummy-{config.model}-{config.seed}" if decided.folder is None else resolve.fingerprint(decided.folder)
        files = offload_dir / f"{identity}-{str(decided.dtype).removeprefix('torch.')}"
        loader = Loader(self.weights, files if uses_disk or config.offload_path else None, cache_quantized=config.offload_path is not None)
        with torch.inference_mode():
            self.statistics.loaded_bytes = loader.load(self._pieces)
            self.statistics.reused_bytes = loader.reused_bytes
        self.weights.check()
        if decided.speculation is not None:
            self.speculator = decided.speculation.load(self.lanes, decided.dtype, offload_dir)
            self._stack.callback(self.speculator.close)
            if config.simulate_acceptance is not None:
                logger.warning("SIMULATED acceptance %g: drafted tokens are accepted by chance, the text means nothing", config.simulate_acceptance)
        self.statistics.load_seconds = time.perf_counter() - started
        logger.info("loaded %s in %.1f s: %s", config.model, self.statistics.load_seconds, realized(decided.weight_plan.realized_percent))

    def _pieces(self, skip: set[tuple[int, str]]) -> Iterator[Piece | QuantizedPiece]:
        """The checkpoint's stream, or random weights, without the (layer, role) pairs in ``skip``."""
        if self.decided.folder is not None:
            yield from checkpoint.stream(self.decided.folder, self.arch, skip, packed=True)
            return
        for piece in dummy(self.arch, self.config.seed, self.decided.dtype):
            if (piece.layer, piece.role) not in skip:
                yield piece

    # Jobs

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_finished: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete prompts (text, token ids or chat messages); one SamplingParams for all or one each. Results in the order of the prompts.

        ``on_finished`` is called with every completion as it ends, in any order.
        Raises PromptError for the first prompt that cannot be run, before anything is generated.
        """
        prompts, params, encoded = self._encode(prompts, sampling_params)
        job = self._job(zip(encoded, params, strict=True))
        requests = [
            (i, Request(i, token_ids, p, sample, prompt if isinstance(prompt, str) else None))
            for i, (token_ids, prompt, p) in enumerate(zip(encoded, prompts, params, strict=True))
            for sample in range(p.n)
        ]
        if self.config.compare_plain and self.speculator is not None:
            self._run_plainly(requests, job)
        results: dict[int, dict[int, Completion]] = {i: {} for i in range(len(prompts))}
        for request, completion in self._run(requests, job):
            if completion.error:
                raise ConfigurationError(f"prompt {request.index}: {completion.error}")
            results[request.index][request.sample] = completion
            if on_finished is not None:
                on_finished(completion)
        return [with_samples(results[i]) for i in range(len(prompts))]

    def prepare(self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None) -> None:
        """Allocate what a job of these prompts needs (cache, staging, buffers), as `generate` would at its start: outside of a measurement, say."""
        _, params, encoded = self._encode(prompts, sampling_params)
        self._prepare(self._job(zip(encoded, params, strict=True)))

    def _encode(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> tuple[list[Prompt], list[SamplingParams], list[tuple[int, ...]]]:
        """Prompts as a list, sampling parameters and token ids for each."""
        prompts = cast("list[Prompt]", [prompts] if isinstance(prompts, str) else list(prompts))
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(prompts)
        else:
            params = list(sampling_params)
            if len(params) != len(prompts):
                raise ConfigurationError(f"{len(params)} sampling parameters for {len(prompts)} prompts; give one, or one each")
        encoded = [self.decided.encoder.encode(i, prompt, p.max_tokens) for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))]
        return prompts, params, encoded

    def stream(
        self, items: Iterable[tuple[Hashable, Prompt, SamplingParams]], on_tokens: Callable[[Hashable, str], None] | None = None
    ) -> Iterator[tuple[Hashable, Completion]]:
        """Complete (key, prompt, params) items as they come; yields (key, completion) as sequences finish, in any order.

        Items are pulled whenever the block has room, so it never drains between them. An item that cannot be run yields a completion with
        ``finish_reason`` "error" and the rest goes on. ``on_tokens(key, new_text)`` is called after every pass with text that will not change any more.
        """
        failed: list[tuple[Hashable, Completion]] = []
        keys: dict[int, tuple[Hashable, int]] = {}

        def encoded() -> Iterator[tuple[int, Request]]:
            for index, (key, prompt, params) in enumerate(items):
                try:
                    token_ids = self.decided.encoder.encode(index, prompt, params.max_tokens)
                except ValueError as error:
                    failed.append((key, Completion((), finish_reason="error", error=str(error), index=index)))
                    continue
                keys[index] = (key, params.n)
                for sample in range(params.n):
                    yield index, Request(index, token_ids, params, sample, prompt if isinstance(prompt, str) else None)

        source = encoded()
        peeked: list[tuple[int, Request]] = []
        for _ in range(PEEKED_BLOCKS * self.policy.block_size):
            item = next(source, None)
            if item is None:
                break
            peeked.append(item)
        if peeked:
            job = growing.holdable(self._job((request.prompt_token_ids, request.params) for _, request in peeked), self.decided.exceeded)
            pending: dict[int, dict[int, Completion]] = {}
            report = (lambda index, text: on_tokens(keys[index][0], text)) if on_tokens else None
            for request, completion in self._run(itertools.chain(peeked, source), job, report):
                yield from failed
                failed.clear()
                index = request.index
                pending.setdefault(index, {})[request.sample] = completion
                if len(pending[index]) == keys[index][1]:
                    yield keys.pop(index)[0], with_samples(pending.pop(index))
        yield from failed

    def _run_plainly(self, requests: list[tuple[int, Request]], job: Job) -> None:
        """The same job without speculation, for the report alone. Neither run finds prompts in the cache that an earlier one has read."""
        statistics, self.statistics = self.statistics, self.plain_statistics
        try:
            self._prepare(job).cache.forget_prefixes()
            for _ in self._run(requests, job, speculate=False):
                pass
            self._prepare(job).cache.forget_prefixes()
        finally:
            self.plain_statistics, self.statistics = self.statistics, statistics

    def _job(self, requests: Iterable[tuple[Sequence[int], SamplingParams]]) -> Job:
        """Lengths of a job's requests."""
        cache_tokens, prompt_tokens = [], []
        for token_ids, params in requests:
            room = min(params.max_tokens, self.arch.max_positions - len(token_ids))
            cache_tokens += [len(token_ids) + max(0, room - 1)] * params.n
            prompt_tokens += [len(token_ids)] * params.n
        return Job(tuple(cache_tokens) or (1,), tuple(prompt_tokens) or (1,))

    def _prepare(self, job: Job) -> Block:
        """A block whose sizes suit the job."""
        decided = self.decided
        decided.suit(job)
        sizes = decided.sizes(job)
        if decided.speculation is not None and self.speculator is not None:
            check_budgets(decided.needs(sizes), decided.budgets)
            decided.speculation.open_block(self.speculator, sizes.sequence_tokens)
        if self.block is not None and self.block.suits(self.policy, sizes):
            return self.block
        self._close_block()
        check_budgets(decided.needs(sizes), decided.budgets)
        self.block = make_block(decided, sizes, self.weights, self.tiers, self.lanes)
        return self.block

    @torch.inference_mode()
    def _run(
        self, requests: Iterable[tuple[int, Request]], job: Job, on_tokens: Callable[[int, str], None] | None = None, speculate: bool = True
    ) -> Iterator[tuple[Request, Completion]]:
        """All requests, in one block; in a larger one from where a request is longer than ``job`` said and has outgrown it."""
        candidates, proposer = self._candidates(requests), self.speculator if speculate else None
        block = self._prepare(job)
        while True:
            batcher = Batcher(self.policy, block.cache, candidates, block.sizes.max_micro_batch_tokens, proposer, self._refusal)
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

    def _candidates(self, requests: Iterable[tuple[int, Request]]) -> Iterator[Candidate]:
        for _, request in requests:
            output = OutputText(
                self.tokenizer,
                request.params,
                eos_token_ids=self.arch.eos_token_ids,
                prompt_tokens=len(request.prompt_token_ids),
                max_context=self.arch.max_positions,
            )
            yield Candidate(RequestState(request, self.config.seed), output)

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
                "cache": dict(zip(("gpu", "cpu", "disk"), (100 * f for f in self.policy.cache.fractions), strict=True)),
                "activations": block.activations.realized_percent if block else {},
            },
            "memory": [asdict(need) for need in decided.needs(block.sizes)] if block else [],
            "peak_bytes": {
                "gpu": tiers.gpu.peak_bytes + (speculator.peak_bytes if speculator is not None else 0),
                "cpu": tiers.cpu.peak_bytes,
                "disk": tiers.disk.peak_bytes,
            },
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


def realized(percent: dict[str, float]) -> str:
    return ", ".join(f"{value:.1f} % {tier}" for tier, value in percent.items())
