"""Passes of models that are too small to compute anything, or as wide as large ones: what is timed to know a
machine."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from flexbatch.execution.block_sizes import block_sizes, cache_layout
from flexbatch.execution.job import Job
from flexbatch.execution.passes import Passes
from flexbatch.execution.runner import Runner, open_runner
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.memory.loading import Loader
from flexbatch.memory.tiers import Pool, Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weight_plan import plan_weights
from flexbatch.memory.weights import WeightStore
from flexbatch.models.arch import Arch
from flexbatch.models.dummy import dummy
from flexbatch.models.families import read_arch
from flexbatch.policy.decode_graphs import MAX_GRAPHS
from flexbatch.policy.limits import weight_group
from flexbatch.policy.piece_graphs import piece_buckets
from flexbatch.policy.policy import Policy, Split
from flexbatch.request import Request, SamplingParams
from flexbatch.trace import Tracer

MIB = 2**20

PROMPT_TOKENS = 4
WARM_UP, PASSES = 2, 6
"""Decode passes that do not count, and that do, the last of them not: it ends the job."""
ON_GPU, ON_CPU = Split(1, 0), Split(0, 1)


def small_arch(num_layers: int, head_dim: int, num_heads: int = 1) -> Arch:
    """With several heads an MLP wide enough that its weights keep the link busy."""
    hidden_size = num_heads * head_dim
    sizes = {"hidden_size": hidden_size, "intermediate_size": hidden_size * min(2, num_heads), "vocab_size": 64}
    config = {
        "model_type": "llama",
        "num_hidden_layers": num_layers,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
    }
    return read_arch(
        {
            **config,
            **sizes,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_heads,
            "eos_token_id": 2,
            "bos_token_id": 1,
        }
    )


def resident(sequences: int, num_gpu_batches: int = 2) -> Policy:
    """Two micro-batches: one alone on the GPU is a graph, whose ticks cost the host nothing."""
    return Policy(ON_GPU, ON_GPU, ON_GPU, sequences, num_gpu_batches, prefill_chunk=PROMPT_TOKENS)


def with_cpu_attention(sequences: int, num_gpu_batches: int = 1) -> Policy:
    """Micro-batches whose cache the CPU attends."""
    return Policy(ON_GPU, ON_CPU, ON_GPU, sequences, num_gpu_batches, cpu_attention=1.0, prefill_chunk=PROMPT_TOKENS)


@dataclass(frozen=True)
class SmallModel:
    """Random weights on their tiers, and the queues of all runners of them, which run their jobs one after another."""

    arch: Arch
    weights: WeightStore
    queues: TransferQueues
    folder: Path


def tiers_of(device: torch.device, folder: Path) -> Tiers:
    """Of one owner: names of what is allocated are its own."""
    pinned = device.type == "cuda"
    gpu, cpu = Pool("gpu", 8192 * MIB, device=device), Pool("cpu", 16384 * MIB, pinned=pinned)
    return Tiers(gpu, cpu, Pool("disk", MIB), folder)


@contextlib.contextmanager
def small_model(
    arch: Arch, device: torch.device, tracer: Tracer, placed: Split = ON_GPU, weight_bits: int = 16
) -> Iterator[SmallModel]:
    """placed: its weights. Those that lie on a GPU come from a pool of numbers there: from the host's the two widest
    models of a profile were 2.3 GB, which eight threads with pinned buffers of their own sent over the link."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        tiers = tiers_of(device, Path(folder))
        stack.callback(tiers.close)
        queues = TransferQueues(device, tracer, disk_threads=1)
        stack.callback(queues.close)
        plan = plan_weights(arch, placed, weight_bits, weight_group(arch.hidden_size), dtype.itemsize)
        weights = WeightStore(plan, tiers, queues, dtype)
        stack.callback(weights.close)
        near = placed == ON_GPU
        loader = Loader(weights, None, cache_quantized=False, threads=0 if near else None)
        loader.load(lambda skip: dummy(arch, 0, dtype, device=device if near else None))
        yield SmallModel(arch, weights, queues, Path(folder))


@contextlib.contextmanager
def runner_of(model: SmallModel, policy: Policy, job: Job) -> Iterator[Runner]:
    """One of several of this model, each with a cache of its own. Of a policy with pieces no pass is one graph."""
    with contextlib.ExitStack() as stack:
        tiers = tiers_of(model.queues.device, model.folder)
        stack.callback(tiers.close)
        layout = cache_layout(model.arch, 16, model.weights.dtype)
        buckets, sizes = piece_buckets(policy), block_sizes(policy, layout, job)
        graphs = 0 if buckets else MAX_GRAPHS
        runner = open_runner(
            model.arch, model.weights, layout, policy, sizes, tiers, model.queues,
            max_graphs=graphs, piece_buckets=buckets,
        )  # fmt: skip
        stack.callback(runner.close)
        yield runner


class SmallModels:
    """Models with layers of a single head on one device, by the number of their layers: opened when they are first
    asked for, and closed together."""

    def __init__(self, device: torch.device, head_dim: int) -> None:
        self.device, self.head_dim = device, head_dim
        self.opened: dict[int, SmallModel] = {}
        self._open = contextlib.ExitStack()

    def of(self, num_layers: int) -> SmallModel:
        if num_layers not in self.opened:
            model = small_model(small_arch(num_layers, self.head_dim), self.device, Tracer())
            self.opened[num_layers] = self._open.enter_context(model)
        return self.opened[num_layers]

    def close(self) -> None:
        self.opened.clear()
        self._open.close()


@dataclass(frozen=True)
class SmallJob:
    """So many requests alike."""

    num_requests: int
    prompt_tokens: int = PROMPT_TOKENS
    new_tokens: int = 1 + WARM_UP + PASSES
    seed: int = 0

    @property
    def lengths(self) -> Job:
        rows = self.prompt_tokens + self.new_tokens
        return Job((rows,) * self.num_requests, (self.prompt_tokens,) * self.num_requests)

    @property
    def requests(self) -> list[Request]:
        """Of another prompt length or seed others: a cache that has seen these has no part of those."""
        params = SamplingParams(max_tokens=self.new_tokens, temperature=0, ignore_eos=True)
        generator = random.Random(f"{self.prompt_tokens} {self.seed}")
        drawn = (generator.choices(range(3, 64), k=self.prompt_tokens) for _ in range(self.num_requests))
        return [Request(index, prompt, params) for index, prompt in enumerate(drawn)]


@contextlib.contextmanager
def job_runner(arch: Arch, policy: Policy, device: torch.device, tracer: Tracer, longest: SmallJob) -> Iterator[Runner]:
    """With a model of its own, for jobs that are no longer than this one."""
    with (
        small_model(arch, device, tracer, policy.weights, policy.weight_bits) as model,
        runner_of(model, policy, longest.lengths) as runner,
    ):
        yield runner


def turns_of(runner: Runner, policy: Policy, tracer: Tracer, job: SmallJob) -> list[tuple[float, float]]:
    """Seconds of every turn of the loop, and of its pass: between two passes sequences are admitted. policy: the
    runner's, but for how much of the prompts a pass reads."""
    sequences = (Sequence(request, sequence_id=request.index) for request in job.requests)
    scheduler = Scheduler(policy, runner.cache, sequences, runner.sizes.max_micro_batch_tokens)
    passes, turns, began = Passes(scheduler, runner.executor, tracer, ahead=False), [], time.perf_counter()
    while scheduler.has_work():
        start = time.perf_counter()
        passes.turn()
        end = time.perf_counter()
        turns.append((end - began, end - start))
        began = end
    return turns


def decode_seconds_of(runner: Runner, policy: Policy, tracer: Tracer, job: SmallJob) -> list[float]:
    """Of the passes of a full block, after some that warm up."""
    return [seconds for _, seconds in turns_of(runner, policy, tracer, job)][1 + WARM_UP : -1]
