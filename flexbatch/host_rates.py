"""What the engine's own Python costs on this machine: per pass, per sequence and per tick.

Small models and blocks that live on the GPU are limited by it (512 sequences of OPT-1.3B on an H200: 9 of 15 milliseconds a pass are the GPU's), and so
is a single micro-batch that waits for CPU attention at every layer. Passes of a model too small to compute anything leave only these costs.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

import numpy as np
import torch
from scipy.optimize import nnls

from flexbatch.detokenize import OutputText
from flexbatch.execution.batcher import Batcher, Candidate
from flexbatch.execution.executor import Executor
from flexbatch.execution.request_state import RequestState
from flexbatch.execution.sampler import draw
from flexbatch.memory.activations import ActivationStore
from flexbatch.memory.host_buffers import HostBuffers
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.loading import Loader
from flexbatch.memory.tiers import Pool, Tiers
from flexbatch.memory.transfer import Lanes
from flexbatch.memory.weight_plan import plan_weights
from flexbatch.memory.weights import WeightStore
from flexbatch.models.arch import Arch
from flexbatch.models.dummy import dummy
from flexbatch.models.families import read_arch
from flexbatch.planning import Job, block_sizes, cache_layout
from flexbatch.policy.types import Policy, Split
from flexbatch.request import Request, SamplingParams
from flexbatch.trace import RecordingTracer, Tracer

MIB = 2**20
ON_GPU, ON_CPU = Split(1, 0), Split(0, 1)
PROMPT_TOKENS = 4
FEW, MANY = 2, 10
"""Layers."""
SHAPES = ((FEW, 8), (FEW, 128), (MANY, 8), (MANY, 128))
"""(layers, sequences of a micro-batch)."""
WARM_UP, PASSES = 3, 6


def small_arch(num_layers: int, head_dim: int) -> Arch:
    sizes = {"hidden_size": head_dim, "intermediate_size": head_dim, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 64}
    config = {"model_type": "llama", "num_hidden_layers": num_layers, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    return read_arch({**config, **sizes, "eos_token_id": 2, "bos_token_id": 1})


def resident(sequences: int, num_gpu_batches: int = 2) -> Policy:
    """Two micro-batches: one alone on the GPU is a graph, whose ticks cost the host nothing."""
    return Policy(ON_GPU, ON_GPU, ON_GPU, sequences, num_gpu_batches, prefill_chunk=PROMPT_TOKENS)


def attended(sequences: int, num_gpu_batches: int = 1) -> Policy:
    """Micro-batches whose cache the CPU attends."""
    return Policy(ON_GPU, ON_CPU, ON_GPU, sequences, num_gpu_batches, cpu_attention=1.0, prefill_chunk=PROMPT_TOKENS)


@contextlib.contextmanager
def open_block(arch: Arch, policy: Policy, job: Job, device: torch.device, dtype: torch.dtype, tracer: Tracer) -> Iterator[tuple[Executor, KVCache, int]]:
    """Executor, cache and the tokens of a micro-batch, with random weights."""
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        pinned = device.type == "cuda"
        tiers = Tiers(Pool("gpu", 256 * MIB, device=device), Pool("cpu", 64 * MIB, pinned=pinned), Pool("disk", MIB), Path(folder))
        stack.callback(tiers.close)
        lanes = Lanes(device, tracer, disk_threads=1)
        stack.callback(lanes.close)
        weights = WeightStore(plan_weights(arch, policy.weights, 16, 64, dtype.itemsize), tiers, lanes, dtype)
        stack.callback(weights.close)
        Loader(weights, None, cache_quantized=False).load(lambda skip: dummy(arch, 0, dtype))
        layout = cache_layout(arch, 16, dtype)
        sizes = block_sizes(policy, layout, job)
        cache = KVCache(layout, sizes.cache, tiers, lanes)
        stack.callback(cache.close)
        tokens = sizes.max_micro_batch_tokens
        activations = ActivationStore(policy.activations, policy.num_gpu_batches, tokens, arch.hidden_size, dtype, layout.page_tokens, tiers, lanes)
        stack.callback(activations.close)
        buffers = HostBuffers(sizes.max_cpu_attention_tokens, arch.num_heads, arch.num_kv_heads, arch.head_dim, dtype, tiers.cpu, lanes)
        stack.callback(buffers.close)
        yield Executor(arch, weights, cache, activations, lanes, buffers, dtype, policy.overlap), cache, tokens


def run_passes(num_layers: int, policy: Policy, device: torch.device, tracer: Tracer) -> list[float]:
    """Seconds of the decode passes of a full block, after some that warm up."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    arch = small_arch(num_layers, 128 if gpu else 8)
    params = SamplingParams(max_tokens=1 + WARM_UP + PASSES, temperature=0, ignore_eos=True)
    chance = random.Random(0)
    requests = [Request(i, tuple(chance.choices(range(3, 64), k=PROMPT_TOKENS)), params) for i in range(policy.block_size)]
    job = Job((PROMPT_TOKENS + params.max_tokens,) * len(requests), (PROMPT_TOKENS,) * len(requests))
    seconds = []
    with open_block(arch, policy, job, device, dtype, tracer) as (executor, cache, tokens):
        batcher = Batcher(policy, cache, (Candidate(RequestState(request), OutputText(None, params)) for request in requests), tokens)
        while batcher.has_work():
            start = time.perf_counter()
            work = batcher.next_pass()
            batcher.commit(work, draw(executor.run(work)))
            seconds.append(time.perf_counter() - start)
    return seconds[1 + WARM_UP : -1]


def decode_seconds(num_layers: int, policy: Policy, device: torch.device) -> float:
    """Of a decode pass: the fastest, since what is above it is the machine's other users."""
    return min(run_passes(num_layers, policy, device, Tracer()))


def attention_seconds(device: torch.device) -> float:
    """Of a call of CPU attention that has next to nothing to attend to, while the host launches the other micro-batch: the lower quartile.

    On an H200's host (16 cores) 0.15 ms alone, and 0.5 ms in a pass: threads have to be woken, and the interpreter is busy launching kernels.
    """
    tracer = RecordingTracer(device)
    run_passes(MANY, attended(16, 2), device, tracer)
    return quantiles([span.end - span.start for span in tracer.spans() if span.resource == "cpu_attention"], n=4)[0]


def layer_seconds(policy: Policy, device: torch.device) -> float:
    """Of a layer more."""
    few, many = (decode_seconds(layers, policy, device) for layers in (FEW, MANY))
    return (many - few) / (MANY - FEW)


@torch.inference_mode()
def host_rates(device: torch.device) -> dict[str, float]:
    """``pass_seconds``, ``sequence_seconds`` and ``launch_seconds`` of `policy.rates.Hardware`, by non-negative least squares over a few shapes, and
    ``graph_seconds`` (0 without a GPU, where there are no graphs), ``exchange_seconds`` and ``settle_seconds``, from how passes of one micro-batch grow with
    the layers; ``cpu_attention_seconds``.
    """
    threads = torch.get_num_threads()
    # There is nothing to share out, and on a busy machine each meeting of two threads costs a time slice.
    torch.set_num_threads(1)
    try:
        measured = [decode_seconds(layers, resident(sequences), device) for layers, sequences in SHAPES]
        layer, in_turn = (layer_seconds(policy, device) for policy in (attended(8), replace(attended(8), overlap=False)))
        in_graph = layer_seconds(resident(8, 1), device) if device.type == "cuda" else 0.0
    finally:
        torch.set_num_threads(threads)
    attention = attention_seconds(device)
    ticks = [2 * (layers + 1) for layers, _ in SHAPES]
    sequences = [2 * each for _, each in SHAPES]
    terms = np.column_stack([np.ones(len(SHAPES)), sequences, ticks])
    # Relative errors: a pass of ten layers is not five times as important as one of two.
    found, _ = nnls(terms / np.array(measured)[:, None], np.ones(len(SHAPES)))
    rates = dict(zip(("pass_seconds", "sequence_seconds", "launch_seconds"), found.tolist(), strict=True))
    exchange, settle = max(0.0, layer - rates["launch_seconds"]), max(0.0, in_turn - layer)
    return {**rates, "graph_seconds": max(0.0, in_graph), "exchange_seconds": exchange, "settle_seconds": settle, "cpu_attention_seconds": attention}
