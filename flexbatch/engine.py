"""The engine: load a model over the tiers, run jobs through it, give results in order."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch

from flexbatch import planning
from flexbatch.config import ConfigurationError, EngineConfig
from flexbatch.detokenize import OutputText
from flexbatch.execution.batcher import Batcher, Candidate, Retired
from flexbatch.execution.executor import Executor
from flexbatch.execution.request_state import RequestState
from flexbatch.execution.sampler import draw
from flexbatch.memory.activations import ActivationStore
from flexbatch.memory.host_buffers import HostBuffers
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.loading import Loader
from flexbatch.memory.tiers import Pool, Tiers, prepare_offload_dir
from flexbatch.memory.transfer import Lanes
from flexbatch.memory.weight_plan import plan_weights
from flexbatch.memory.weights import WeightStore
from flexbatch.models import checkpoint, families, resolve, shapes
from flexbatch.models.checkpoint import Piece, QuantizedPiece
from flexbatch.models.dummy import dummy
from flexbatch.planning import GROUP, BlockSizes, Job
from flexbatch.policy.types import Policy
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
        for name in ("percent", "draft"):
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
        """What `from_config` and running the job would put where, without loading anything: the first part of `report`.

        Raises DoesNotFitError when the job does not fit the budgets.
        """
        engine = cls.__new__(cls)
        engine._choose(config, False, job)
        needs = engine._needs(engine._sizes(job))
        planning.check_fit(needs, engine.budgets)
        return {
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

    def _choose(self, config: EngineConfig, trace: bool, job: Job | None) -> None:
        """Everything that is decided before any weight is loaded."""
        self.config = config
        self.statistics = Statistics()
        self.plain_statistics = Statistics()
        """Of the runs without speculation that --compare-plain asks for."""
        self.block: Block | None = None
        self._stack = contextlib.ExitStack()
        self._read_model()
        self.device = planning.resolve_device(config.device)
        self.dtype = planning.resolve_dtype(config.dtype, self.arch, self.device)
        self.budgets = planning.resolve_budgets(config, self.device)
        self.layout = planning.cache_layout(self.arch, config, self.dtype)
        self.encoder = PromptEncoder(self.tokenizer, max_context=self.arch.max_positions, vocab_size=self.arch.vocab_size)
        self.tracer: Tracer = RecordingTracer(self.device) if trace else Tracer()
        job = job or Job.typical(self.arch.max_positions)
        self.speculation = plan_speculation(config, self.arch, self.tokenizer, self.layout)
        self.policy = planning.choose_policy(self.arch, config, self.layout, job, self._budgets_beside_drafts(job), self.dtype.itemsize)
        packed = {} if self.folder is None else checkpoint.prequantized(self.folder, self.arch)
        self.weight_plan = plan_weights(self.arch, self.policy.weights, config.weight_bits, GROUP, self.dtype.itemsize, packed)
        planning.check_fit(self._needs(self._sizes(replace(job, cache_tokens=job.cache_tokens[:1], prompt_tokens=job.prompt_tokens[:1]))), self.budgets)

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

    def _budgets_beside_drafts(self, job: Job) -> dict[str, int]:
        """What is left for the target when the drafts serve a block of the size that the settings name."""
        if self.speculation is None:
            return self.budgets
        block = (self.config.gpu_batch_size or planning.DEFAULT_MICRO_BATCH) * (self.config.num_gpu_batches or 1)
        taken = sum(need.num_bytes for need in self.speculation.needs(sorted(job.cache_tokens, reverse=True)[:block]))
        return {**self.budgets, "gpu": max(1, self.budgets["gpu"] - taken)}

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
            job = self._job((request.prompt_token_ids, request.params) for _, request in peeked)
            pending: dict[int, dict[int, Completion]] = {}
            report = (lambda index, text: on_tokens(keys[index][0], text)) if on_tokens else None
            for request, completion in self._run(chained(peeked, source), job, report):
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
        sizes = self._sizes(job)
        if self.speculation is not None and self.speculator is not None:
            planning.check_fit(self._needs(sizes), self.budgets)
            self.speculation.open_block(self.speculator, sizes.sequence_tokens)
        if self.block is not None and self.block.suits(self.policy, sizes):
            return self.block
        if self.block is not None:
            self.block.close()
            self.block = None
        planning.check_fit(self._needs(sizes), self.budgets)
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
        """The loop of the engine: compose a pass, run it, commit what it drew."""
        block = self._prepare(job)
        proposer = self.speculator if speculate else None
        batcher = Batcher(self.policy, block.cache, self._candidates(requests), block.sizes.max_micro_batch_tokens, proposer)
        shown: dict[int, int] = {}
        started = time.perf_counter()
        try:
            while batcher.has_work():
                work = batcher.next_pass()
                logits = block.executor.run(work)
                batcher.commit(work, draw(logits, proposer))
                self.statistics.passes += 1
                self.statistics.prefilled_tokens += work.num_prompt_tokens
                if on_tokens is not None:
                    report_text(batcher, shown, on_tokens)
                for retired in batcher.take_retired():
                    yield retired.state.request, self._completion(retired)
            for retired in batcher.take_retired():
                yield retired.state.request, self._completion(retired)
        finally:
            batcher.abort()
            self.weights.drain()
            self.statistics.seconds += time.perf_counter() - started
            self.statistics.moved_bytes = self.lanes.moved_bytes()

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
            completion.prompt_logprobs = [None, *sequence.prompt_logprobs]
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
            "peak_bytes": {pool.tier: pool.peak_bytes for pool in (self.tiers.gpu, self.tiers.cpu, self.tiers.disk)},
            "load_seconds": s.load_seconds,
            "seconds": s.seconds,
            "passes": s.passes,
            "requests": s.requests,
            "prompt_tokens": s.prompt_tokens,
            "prefilled_tokens": s.prefilled_tokens,
            "generated_tokens": s.generated_tokens,
            "generated_tokens_per_second": s.generated_tokens / s.seconds if s.seconds else 0.0,
            "total_tokens_per_second": (s.prompt_tokens + s.generated_tokens) / s.seconds if s.seconds else 0.0,
            "moved_bytes": s.moved_bytes,
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
            report["plain_passes"] = plain.passes
            report["speed_up"] = (fast.generated_tokens / fast.seconds) / (plain.generated_tokens / plain.seconds)
        return report

    def close(self) -> None:
        """Free pinned memory, threads and files."""
        if self.block is not None:
            self.block.close()
            self.block = None
        self._stack.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def chained(first: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    yield from first
    yield from rest


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
