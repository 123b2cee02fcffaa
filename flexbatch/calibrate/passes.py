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


@contextlib.contextmanager
def small_runner(
    arch: Arch, policy: Policy, job: Job, device: torch.device, dtype: torch.dtype, tracer: Tracer
) -> Iterator[Runner]:
    """A runner with random weights. Of a policy with pieces no pass is one graph."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        pinned = device.type == "cuda"
        tiers = Tiers(
            Pool("gpu", 8192 * MIB, device=device),
            Pool("cpu", 16384 * MIB, pinned=pinned),
            Pool("disk", MIB),
            Path(folder),
        )
        stack.callback(tiers.close)
        queues = TransferQueues(device, tracer, disk_threads=1)
        stack.callback(queues.close)
        group = weight_group(arch.hidden_size)
        plan = plan_weights(arch, policy.weights, policy.weight_bits, group, dtype.itemsize)
        weights = WeightStore(plan, tiers, queues, dtype)
        stack.callback(weights.close)
        Loader(weights, None, cache_quantized=False).load(lambda skip: dummy(arch, 0, dtype))
        layout = cache_layout(arch, 16, dtype)
        buckets, sizes = piece_buckets(policy), block_sizes(policy, layout, job)
        graphs = 0 if buckets else MAX_GRAPHS
        runner = open_runner(
            arch, weights, layout, policy, sizes, tiers, queues, max_graphs=graphs, piece_buckets=buckets
        )
        stack.callback(runner.close)
        yield runner


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
    """For jobs that are no longer than this one. Opening one takes a GPU's host as long as ten passes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with small_runner(arch, policy, longest.lengths, device, dtype, tracer) as runner:
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
