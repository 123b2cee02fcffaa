"""The engine: load a model over the tiers, run jobs through it, give results in order."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch

from flexbatch import adapting, choosing, growing, machines, planning
from flexbatch.config import ConfigurationError, DoesNotFitError, EngineConfig
from flexbatch.detokenize import OutputText
from flexbatch.execution.batcher import Batcher, Candidate, Retired
from flexbatch.execution.executor import Executor
from flexbatch.execution.request_state import RequestState
from flexbatch.execution.sampler import draw
from flexbatch.memory.activations import ActivationStore
from flexbatch.memory.host_buffers import HostBuffers
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.loading import Loader
from flexbatch.memory.tiers import Need, Pool, Tiers, check_budgets, prepare_offload_dir
from flexbatch.memory.transfer import Lanes
from flexbatch.memory.weight_plan import WeightPlan, plan_weights
from flexbatch.memory.weights import WeightStore
from flexbatch.models import checkpoint, families, resolve, shapes
from flexbatch.models.checkpoint import Piece, QuantizedPiece
from flexbatch.models.dummy import dummy
from flexbatch.planning import BlockSizes, Job
from flexbatch.policy.groups import weight_group
from flexbatch.policy.replan import Replan
from flexbatch.policy.types import Hardware, Policy
from flexbatch.prompts import Prompt, PromptEncoder
from flexbatch.request import Completion, Request, SamplingParams
from flexbatch.speculative.setup import plan_speculation
from flexbatch.speculative.speculator import Speculator
from flexbatch.trace import RecordingTracer, Tracer

logger = logging.getLogger("flexbatch")

PEEKED_BLOCKS = 4
"""Blocks of requests that `stream` looks ahead to size the cache, when the job's lengths are not known."""


@dataclass
class Statistics:
    """What the runs of an engine measured."""

    seconds: float = 0.0
    passes: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    requests: int = 0
    load_seconds: float = 0.0
    loaded_bytes: int = 0
    """Read from the checkpoint, in its own dtype."""
    reused_bytes: int = 0
    """Taken from what an earlier start left in the offload folder, in place of the checkpoint."""
    moved_bytes: dict[str, int] = field(default_factory=dict)


@dataclass
class Block:
    """Everything that lives as long as the sizes of the block fit the jobs: cache, activations, buffers, executor."""

    policy: Policy
    sizes: BlockSizes
    cache: KVCache
    activations: ActivationStore
    host_buffers: HostBuffers
    executor: Executor

    def suits(self, policy: Policy, sizes: BlockSizes) -> bool:
        """Whether a job of these sizes can run in this block."""
        mine, wanted = asdict(self.sizes.cache), asdict(sizes.cache)
        return (
            self.policy == policy
            and all(mine[name] >= wanted[name] for name in wanted)
            and self.sizes.max_cpu_attention_tokens >= sizes.max_cpu_attention_tokens
        )

    def check(self) -> None:
        self.cache.check()
        self.activations.check()
        self.host_buffers.check()

    def close(self) -> None:
        self.cache.close()
        self.activations.close()
        self.host_buffers.close()


class LLM:
    """A model whose weights, KV cache and activations are spread over GPU, CPU and disk.

    Keywords are the fields of `EngineConfig`; what is None is chosen. Use as a context manager, or call `close`: it frees pinned memory, threads, files.
    Raises ConfigurationError for wrong settings, DoesNotFitError when the budgets are short (before anything is loaded), CheckpointError for a bad model.
    """

    def __init__(self, model: str = "demo", *, trace: bool = False, **settings: Any) -> None:
        for name in ("percent", "draft", "allow_bits"):
            if isinstance(settings.get(name), list):
                settings[name] = tuple(settings[name])
        self._start(EngineConfig(model=model, **settings), trace, None)

    @classmethod
    def from_config(cls, config: EngineConfig, trace: bool = False, job: Job | None = None) -> LLM:
        """An engine from a ready configuration; ``job`` tells the planner what will be run."""
        engine = cls.__new__(cls)
        engine._start(config, trace, job)
        return engine

    @classmethod
    def plan(cls, config: EngineConfig, job: Job) -> dict[str, Any]:
        """What `from_config` and running the job would put where, without loading anything: the first part of `report`, and the `Plan` as "plan".

        With a named machine (--hardware) and the default device, it is planned for that machine and its memory; nothing is measured.
        Raises DoesNotFitError when the job does not fit the budgets.
        """
        engine = cls.__new__(cls)
        engine._choose(config, False, job, dry=True)
        needs = engine._needs(engine._sizes(job))
        check_budgets(needs, engine.budgets)
        plan = engine.plan_of_run or choosing.priced(engine.problem, choosing.without_reserves(engine.hardware), engine.policy)
        return {
            "plan": plan,
            "model": config.model,
            "device": str(engine.device),
            "dtype": str(engine.dtype).removeprefix("torch."),
            "policy": asdict(engine.policy),
            "percent": list(engine.policy.percent),
            "realized_percent": {"weights": engine.weight_plan.realized_percent},
            "memory": [asdict(need) for need in needs],
            "budgets": engine.budgets,
        }

    def _start(self, config: EngineConfig, trace: bool, job: Job | None) -> None:
        self._choose(config, trace, job)
        try:
            self._load()
        except BaseException:
            self._stack.close()
            raise

    def _choose(self, config: EngineConfig, trace: bool, job: Job | None, dry: bool = False) -> None:
        """Everything that is decided before any weight is loaded."""
        self.config = config
        self.statistics = Statistics()
        self.plain_statistics = Statistics()
        """Of the runs without speculation that --compare-plain asks for."""
        self.block: Block | None = None
        self.prediction: dict[str, Any] = {}
        """Predicted against measured, of the last run that had a plan."""
        self._stack = contextlib.ExitStack()
        self._read_model()
        named = machines.named(config.hardware)
        elsewhere = dry and named is not None and config.device == "auto"
        self.device = torch.device(named.device) if elsewhere and named else planning.resolve_device(config.device)
        self.dtype = planning.resolve_dtype(config.dtype, self.arch, self.device)
        self.budgets = planning.resolve_budgets(config, self.device, named if elsewhere else None)
        self._hardware, self._dry = named, dry
        folder = config.offload_path or planning.default_offload_dir()
        self._profile = machines.profile_path(config.hardware, self.device, folder, machines.default_profile_dir()) if config.recalibrate else None
        self.layout = planning.cache_layout(self.arch, config.cache_bits, self.dtype)
        self.encoder = PromptEncoder(self.tokenizer, max_context=self.arch.max_positions, vocab_size=self.arch.vocab_size)
        self.speculation = plan_speculation(config, self.arch, self.tokenizer, self.layout)
        self._packed = {} if self.folder is None else checkpoint.prequantized(self.folder, self.arch)
        self.replans: list[str] = []
        self._shortest_refused = sys.maxsize
        """Token rows of the shortest request that no policy was found to hold."""
        typical = Job.typical(self.arch.max_positions)
        try:
            self._decide(job or typical)
        except DoesNotFitError:
            # The jobs to come may be smaller than a typical one: one sequence has to fit.
            if job is not None:
                raise
            self._decide(typical.first(1))
        self.weight_plan = self._weight_plan(self.policy)
        check_budgets(self._needs(self._sizes((job or typical).first(1))), self.budgets)
        metered = not dry and self.plan_of_run is not None
        self.tracer: Tracer = RecordingTracer(self.device) if trace else adapting.UsageTracer(self.device) if metered else Tracer()

    @property
    def hardware(self) -> Hardware:
        """The machine that plans are made for; measured at first use."""
        if self._hardware is None:
            folder = self.config.offload_path or planning.default_offload_dir()
            self._hardware = machines.this_machine(self.device, folder, machines.default_profile_dir(), measure=not self._dry)
        return self._hardware

    def _decide(self, job: Job, loaded: Policy | None = None) -> None:
        """Policy and plan for a job; with ``loaded``, around weights that are in memory. Raises DoesNotFitError."""
        self.problem = choosing.Problem(self.arch, self.config, job, self.budgets, self.dtype.itemsize, self._packed, loaded)
        choice = choosing.choose_policy(self.problem, lambda: self.hardware, lambda policy: self._needs_of(policy, job))
        self.policy, self.plan_of_run = choice.policy, choice.plan
        self.layout = planning.cache_layout(self.arch, self.policy.cache_bits, self.dtype)
        if self.plan_of_run is not None:
            predicted = self.plan_of_run.predicted_tokens_per_second
            logger.info("chose %s: %.4g tok/s predicted, limited by %s", described(self.policy), predicted, self.plan_of_run.limiting_resource)

    def _weight_plan(self, policy: Policy) -> WeightPlan:
        bits = self.config.weight_bits if self._packed else policy.weight_bits
        return plan_weights(self.arch, policy.weights, bits, weight_group(self.arch.hidden_size), self.dtype.itemsize, self._packed)

    def _needs_of(self, policy: Policy, job: Job) -> list[Need]:
        """Exact needs of a job under any policy."""
        layout = planning.cache_layout(self.arch, policy.cache_bits, self.dtype)
        sizes = planning.block_sizes(policy, layout, job, self.speculation.max_nodes if self.speculation else 0)
        drafts = self.speculation.needs(sizes.sequence_tokens) if self.speculation else []
        return planning.needs(self._weight_plan(policy), policy, layout, sizes, self.dtype, self.device.type == "cuda") + drafts

    def _suit(self, job: Job) -> None:
        """Decide again for a job that is not like the one that the policy was chosen for; the weights stay where they are."""
        fits = not choosing.overshoot(self._needs(self._sizes(job)), self.budgets)
        if fits and not choosing.differs(self.problem, self.policy, job):
            return
        problem = self.problem
        try:
            self._decide(job, self.policy)
        except DoesNotFitError:
            self.problem = problem
            if not fits:
                raise

    def _read_model(self) -> None:
        """Architecture and tokenizer; no weights yet."""
        self.tokenizer: Any = None
        if self.config.dummy_weights:
            self.folder = None
            self.arch = shapes.shape(self.config.model)
            return
        self.folder = resolve.resolve(self.config.model)
        self.arch = families.read_arch(checkpoint.read_config(self.folder))
        self.tokenizer = resolve.load_tokenizer(self.folder)

    def _sizes(self, job: Job) -> BlockSizes:
        return planning.block_sizes(self.policy, self.layout, job, self.speculation.max_nodes if self.speculation else 0)

    def _needs(self, sizes: BlockSizes) -> list[Any]:
        drafts = self.speculation.needs(sizes.sequence_tokens) if self.speculation else []
        return planning.needs(self.weight_plan, self.policy, self.layout, sizes, self.dtype, self.device.type == "cuda") + drafts

    def _load(self) -> None:
        """Weights to their homes."""
        started = time.perf_counter()
        config, cuda = self.config, self.device.type == "cuda"
        offload_dir = config.offload_path or planning.default_offload_dir()
        uses_disk = any(split.disk > 0 for split in (self.policy.weights, self.policy.cache, self.policy.activations))
        if uses_disk or config.offload_path is not None:
            prepare_offload_dir(offload_dir)
        self.tiers = Tiers(
            gpu=Pool("gpu", self.budgets["gpu"], device=self.device),
            cpu=Pool("cpu", self.budgets["cpu"], pinned=cuda),
            disk=Pool("disk", self.budgets["disk"]),
            offload_dir=offload_dir,
        )
        self._stack.callback(self.tiers.close)
        self.lanes = Lanes(self.device, self.tracer)
        self._stack.callback(self.lanes.close)
        self.weights = WeightStore(self.weight_plan, self.tiers, self.lanes, self.dtype)
        self._stack.callback(self.weights.close)
        identity = f"dummy-{config.model}-{config.seed}" if self.folder is None else resolve.fingerprint(self.folder)
        files = offload_dir / f"{identity}-{str(self.dtype).removeprefix('torch.')}"
        loader = Loader(self.weights, files if uses_disk or config.offload_path else None, cache_quantized=config.offload_path is not None)
        with torch.inference_mode():
            self.statistics.loaded_bytes = loader.load(self._pieces)
            self.statistics.reused_bytes = loader.reused_bytes
        self.weights.check()
        self.speculator: Speculator | None = None
        if self.speculation is not None:
            self.speculator = self.speculation.load(self.lanes, self.dtype, offload_dir)
            self._stack.callback(self.speculator.close)
            if config.simulate_acceptance is not None:
                logger.warning("SIMULATED acceptance %g: drafted tokens are accepted by chance, the text means nothing", config.simulate_acceptance)
        self.statistics.load_seconds = time.perf_counter() - started
        logger.info("loaded %s in %.1f s: %s", config.model, self.statistics.load_seconds, realized(self.weight_plan.realized_percent))

    def _pieces(self, skip: set[tuple[int, str]]) -> Iterator[Piece | QuantizedPiece]:
        """The checkpoint's stream, or random weights, without the (layer, role) pairs in ``skip``."""
        if self.folder is not None:
            yield from checkpoint.stream(self.folder, self.arch, skip, packed=True)
            return
        for piece in dummy(self.arch, self.config.seed, self.dtype):
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
        encoded = [self.encoder.encode(i, prompt, p.max_tokens) for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))]
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
                    token_ids = self.encoder.encode(index, prompt, params.max_tokens)
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
            job = growing.holdable(self._job((request.prompt_token_ids, request.params) for _, request in peeked), self._exceeded)
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
        """The same job without speculation, for the report alone."""
        statistics, self.statistics = self.statistics, self.plain_statistics
        try:
            for _ in self._run(requests, job, speculate=False):
                pass
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
        self._suit(job)
        sizes = self._sizes(job)
        if self.speculation is not None and self.speculator is not None:
            check_budgets(self._needs(sizes), self.budgets)
            self.speculation.open_block(self.speculator, sizes.sequence_tokens)
        if self.block is not None and self.block.suits(self.policy, sizes):
            return self.block
        self._close_block()
        check_budgets(self._needs(sizes), self.budgets)
        policy, arch, tiers, lanes = self.policy, self.arch, self.tiers, self.lanes
        cache = KVCache(self.layout, sizes.cache, tiers, lanes)
        activations = ActivationStore(
            policy.activations, policy.num_gpu_batches, sizes.max_micro_batch_tokens, arch.hidden_size, self.dtype, self.layout.page_tokens, tiers, lanes
        )
        host_buffers = HostBuffers(sizes.max_cpu_attention_tokens, arch.num_heads, arch.num_kv_heads, arch.head_dim, self.dtype, tiers.cpu, lanes)
        executor = Executor(arch, self.weights, cache, activations, lanes, host_buffers, self.dtype, self.config.overlap)
        self.block = Block(policy, sizes, cache, activations, host_buffers, executor)
        return self.block

    @torch.inference_mode()
    def _run(
        self, requests: Iterable[tuple[int, Request]], job: Job, on_tokens: Callable[[int, str], None] | None = None, speculate: bool = True
    ) -> Iterator[tuple[Request, Completion]]:
        """All requests, in one block; in a larger one from where a request is longer than ``job`` said and has outgrown it."""
        candidates, proposer = self._candidates(requests), self.speculator if speculate else None
        block = self._prepare(job)
        while True:
            batcher = Batcher(self.policy, block.cache, candidates, block.sizes.max_micro_batch_tokens, self._refusal, proposer)
            yield from self._run_block(block, batcher, proposer, on_tokens)
            if not batcher.outgrown:
                return
            job, candidates = growing.look_ahead(batcher.remaining(), PEEKED_BLOCKS * self.policy.block_size)
            block = growing.prepared(self._prepare, growing.holdable(job, self._exceeded))
            logger.info("made a larger block: a request was longer than those that the stream began with")

    def _refusal(self, candidate: Candidate) -> str:
        return growing.refusal(candidate, self._exceeded, self.budgets)

    def _exceeded(self, job: Job) -> dict[str, int]:
        """Bytes by tier that a block for a job needs beyond the budgets; none where another policy, around the loaded weights, would hold it."""
        exceeded = choosing.overshoot(self._needs(self._sizes(job)), self.budgets)
        if not exceeded or self.problem.settled or job.longest >= self._shortest_refused:
            return exceeded
        problem = dataclasses.replace(self.problem, job=job, loaded=self.policy)
        try:
            choosing.choose_policy(problem, lambda: self.hardware, lambda policy: self._needs_of(policy, job))
        except DoesNotFitError:
            self._shortest_refused = job.longest
            return exceeded
        return {}

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
                if self._profile is not None and meter.passes:
                    self._hardware = meter.recalibrated(self.hardware)
                    machines.save(self._hardware, self._profile)
                    logger.info("recalibrated the machine's profile by %d passes -> %s", meter.passes, self._profile)

    def _meter(self) -> adapting.PassMeter | None:
        """Compares the passes of a run with its plan; None where nothing was planned, or drafts change what a pass is."""
        if self.plan_of_run is None or self.speculator is not None:
            return None
        return adapting.PassMeter(self.plan_of_run, adapting.BusySeconds(self.tracer))

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
        request, output, sequence = retired.state.request, retired.output, retired.sequence
        self.statistics.requests += 1
        self.statistics.prompt_tokens += len(request.prompt_token_ids)
        self.statistics.generated_tokens += len(output.token_ids)
        completion = Completion(request.prompt_token_ids, prompt=request.prompt, index=request.index, error=retired.error, finish_reason="error")
        if sequence is None or output.finish is None:
            return completion
        completion.token_ids, completion.text = list(output.token_ids), output.text
        completion.finish_reason, completion.stop_reason = output.finish.reason, output.finish.stop_reason
        if request.params.logprobs is not None:
            completion.logprobs = sequence.logprobs
        if request.params.prompt_logprobs is not None:
            unscored = min(request.params.prompt_logprobs_start, len(request.prompt_token_ids))
            completion.prompt_logprobs = [*[None] * unscored, *sequence.prompt_logprobs]
        return completion

    # Report and end

    def report(self) -> dict[str, Any]:
        """Plan, realised placement, throughput and bytes per resource of what was run so far."""
        s = self.statistics
        cache = self.block.cache if self.block else None
        return {
            "model": self.config.model,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "policy": asdict(self.policy),
            "percent": list(self.policy.percent),
            "realized_percent": {
                "weights": self.weight_plan.realized_percent,
                "cache": dict(zip(("gpu", "cpu", "disk"), (100 * f for f in self.policy.cache.fractions), strict=True)),
                "activations": self.block.activations.realized_percent if self.block and cache else {},
            },
            "memory": [asdict(need) for need in self._needs(self.block.sizes)] if self.block else [],
            "budgets": self.budgets,
            "peak_bytes": {
                "gpu": self.tiers.gpu.peak_bytes + (self.speculator.peak_bytes if self.speculator is not None else 0),
                "cpu": self.tiers.cpu.peak_bytes,
                "disk": self.tiers.disk.peak_bytes,
            },
            "load_seconds": s.load_seconds,
            "loaded_bytes": s.loaded_bytes,
            "reused_bytes": s.reused_bytes,
            "seconds": s.seconds,
            "passes": s.passes,
            "requests": s.requests,
            "prompt_tokens": s.prompt_tokens,
            "prefilled_tokens": s.prefilled_tokens,
            "generated_tokens": s.generated_tokens,
            "generated_tokens_per_second": s.generated_tokens / s.seconds if s.seconds else 0.0,
            "total_tokens_per_second": (s.prompt_tokens + s.generated_tokens) / s.seconds if s.seconds else 0.0,
            "moved_bytes": s.moved_bytes,
            **({"prediction": {**self.prediction, "replans": list(self.replans)}} if self.prediction else {}),
            "resources": {name: asdict(use) for name, use in self.tracer.summary().items()},
            **({"speculation": self._speculation_report()} if self.speculator is not None else {}),
        }

    def _speculation_report(self) -> dict[str, Any]:
        """Of the speculator; with --compare-plain also the plain runs of the same jobs in this engine."""
        assert self.speculator is not None
        report, plain, fast = self.speculator.report(), self.plain_statistics, self.statistics
        if plain.generated_tokens:
            report["plain_seconds"] = plain.seconds
            report["plain_tokens_per_second"] = plain.generated_tokens / plain.seconds
            report["plain_tokens"] = plain.generated_tokens
            report["plain_passes"] = plain.passes
            report["speed_up"] = (fast.generated_tokens / fast.seconds) / (plain.generated_tokens / plain.seconds)
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


def described(policy: Policy) -> str:
    percent = " ".join(f"{share:.4g}" for share in policy.percent)
    return f"--percent {percent}, {policy.num_gpu_batches} micro-batches of {policy.gpu_batch_size}, {policy.cpu_attention:.0%} CPU attention"


def realized(percent: dict[str, float]) -> str:
    return ", ".join(f"{value:.1f} % {tier}" for tier, value in percent.items())


def with_samples(completions: dict[int, Completion]) -> Completion:
    """The first of the n completions of a prompt, with all of them as its samples when there are several; they end in any order."""
    first = completions[0]
    if len(completions) > 1:
        first.samples = [completions[sample] for sample in sorted(completions)]
    return first


def report_text(batcher: Batcher, shown: dict[int, int], on_tokens: Callable[[int, str], None]) -> None:
    """Hand on the new text of every sequence."""
    running = [(s.state.request.index, s.output) for batch in batcher.micro_batches for s in batch]
    for index, output in [*running, *((r.state.request.index, r.output) for r in batcher.retired)]:
        text = output.text
        if len(text) > shown.get(index, 0):
            on_tokens(index, text[shown.get(index, 0) :])
            shown[index] = len(text)
