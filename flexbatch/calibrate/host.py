"""What the engine's own Python costs on this machine: per pass, per sequence and per tick.

Small models and blocks that live on the GPU are limited by it (512 sequences of OPT-1.3B on an H200: 9 of 15
milliseconds a pass are the GPU's), and so is a single micro-batch that waits for CPU attention at every layer.
Passes of a model too small to compute anything leave only these costs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import NamedTuple

import numpy as np
import torch

from flexbatch.calibrate.composing import composing_seconds, with_composing
from flexbatch.calibrate.fits import non_negative
from flexbatch.calibrate.graphs import graph_seconds, piece_seconds
from flexbatch.calibrate.passes import (
    MIB,
    ON_CPU,
    ON_GPU,
    SmallJob,
    SmallModels,
    decode_seconds_of,
    job_runner,
    resident,
    runner_of,
    small_arch,
    turns_of,
    with_cpu_attention,
)
from flexbatch.calibrate.phases import Phases
from flexbatch.kernels.threads import one_thread
from flexbatch.memory.host_memory import host_memory_bytes
from flexbatch.models.specs import weight_specs
from flexbatch.policy.attention_seconds import KEYS_OF_SEQUENCE
from flexbatch.policy.policy import Policy, Split
from flexbatch.trace import RecordingTracer, Span, Tracer

FEW, MANY = 2, 10
"""Layers."""
GRAPHED = (16, 512)
"""Sequences of passes that are one graph each, whose layers cost the host nothing: they tell what a pass and a
sequence cost from what a tick does. Without them the same three numbers fitted four passes of an H200's host at 0.5
or 1.2 ms a pass and 0.37 or 0.5 ms a tick."""
ROUNDS = 2
"""Every measurement of the host is repeated so often, and the fastest counts: other users of it come and go within
seconds."""
MANY_SEQUENCES = 128
ATTENDED_SEQUENCES, ATTENDED_HEADS, ATTENDED_LAYERS, ATTENDED_CONTEXTS = 32, 32, 4, (128, 512)
"""Sequences of a micro-batch, heads, layers and prompt tokens of the passes that CPU attention is measured in, with
layers as wide as those of models of 7 billion: calls of 67 and 268 MB, eight of them a pass. Of 0.67 GB a pass
with half as wide layers the processor's caches kept a part: 130 to 154 GB/s on H200's hosts, where the passes of
models of 7 and 13 billion saw 95 to 120."""
ATTENDED_BYTES = 72 * MIB
"""Host memory of such a sequence and its counterpart in the other micro-batch, in bytes; with the weights, a quarter of
what is free has to do."""


ALONE = "cpu_attention_alone"
"""The key under which `host_rates` gives bytes a second in passes whose weights stay on the GPU. `cpu_attention` of
`Hardware` starts with it."""


def head_dim(device: torch.device) -> int:
    return 128 if device.type == "cuda" else 8


@contextlib.contextmanager
def decode_passes(num_layers: int, policy: Policy, models: SmallModels) -> Iterator[Callable[[], float]]:
    """Gives what runs a job and returns the seconds of a decode pass: the median, which is what jobs take. The fastest
    of three was 0.5 ms less than the mean pass of a job on H100's hosts with other users, of 1.5 that the host takes
    beside a graph."""
    job, tracer = SmallJob(policy.block_size), Tracer()
    with runner_of(models.of(num_layers), policy, job.lengths) as runner:
        yield lambda: median(decode_seconds_of(runner, policy, tracer, job))


def attention_seconds(device: torch.device) -> float:
    """Returns the seconds of a call of CPU attention that has next to nothing to attend to, while the host
    launches the other micro-batch: the lower quartile."""
    tracer, policy = RecordingTracer(device), with_cpu_attention(16, 2)
    job = SmallJob(policy.block_size)
    with job_runner(small_arch(MANY, head_dim(device)), policy, device, tracer, job) as runner:
        decode_seconds_of(runner, policy, tracer, job)
    return quantiles([span.end - span.start for span in tracer.spans() if span.resource == "cpu_attention"], n=4)[0]


@dataclass(frozen=True)
class AttentionCalls:
    """Sizes of the passes that CPU attention is measured in."""

    sequences: int
    num_heads: int
    num_layers: int
    contexts: tuple[int, int]

    @classmethod
    def for_memory(cls, free_bytes: int) -> AttentionCalls:
        """The largest passes that a quarter of the host's free memory allows."""
        arch = small_arch(ATTENDED_LAYERS, 128, ATTENDED_HEADS)
        weights = sum(math.prod(spec.shape) for spec in weight_specs(arch)) * 2
        sequences = max(2, min(ATTENDED_SEQUENCES, (free_bytes // 4 - weights) // ATTENDED_BYTES))
        return cls(sequences, ATTENDED_HEADS, ATTENDED_LAYERS, ATTENDED_CONTEXTS)


class AttentionInPasses(NamedTuple):
    """What CPU attention and a link beside it do in the passes of a model."""

    call_seconds: float
    """Fixed cost of a call."""
    rate: float
    """Bytes attended a second beside it."""
    link_rate: float
    """Bytes a second of the copies of weights, those counted most that attention ran beside; infinite without
    copies."""


def attention_in_passes(device: torch.device, weights: Split, calls: AttentionCalls) -> AttentionInPasses:
    """Measured in passes of a model with ``weights``.

    Measured alone, beside nothing but copies, a call looked 0.3 to 0.5 ms cheaper and a third faster than it was in
    the passes of OPT-6.7B on an H200's host: the interpreter launches kernels meanwhile, threads have to be woken,
    and the engine takes a core. The link ran at 47 of 55 GB/s beside it by the one measurement, and at 51 to 54 in
    passes.
    """
    sizes, seconds = [], []
    arch, tracer = small_arch(calls.num_layers, head_dim(device), calls.num_heads), RecordingTracer(device)
    policy = replace(with_cpu_attention(calls.sequences, 2), weights=weights)
    # As many tokens of prompts a pass as the longest have: shorter ones come in one, after which all calls are full.
    budget = 8 * calls.contexts[-1]
    policies = [replace(policy, prefill_chunk=context, prefill_budget=budget) for context in calls.contexts]
    jobs = [SmallJob(policy.block_size, context) for context in calls.contexts]
    # Placing a GB of weights and two of cache in pinned memory takes longer than the passes of a job.
    with job_runner(arch, policies[-1], device, tracer, jobs[-1]) as runner:
        for policy, job in zip(policies, jobs, strict=True):
            began = tracer.clock()
            turns_of(runner, policy, tracer, job)
            spans = [span for span in tracer.spans() if span.start >= began]
            attention = [span for span in spans if span.resource == "cpu_attention"]
            # While prompts still come in, calls are smaller.
            most = max(span.num_bytes for span in attention)
            full = [span for span in attention if span.num_bytes > 0.95 * most]
            sizes.append(median(span.num_bytes for span in full))
            seconds.append(median(span.end - span.start for span in full))
    link_rate = rate_beside([span for span in spans if span.resource == "h2d" and span.start > full[0].start], full)
    slope = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
    if slope <= 0:
        # On a busy machine the shorter calls may take longer.
        return AttentionInPasses(0.0, sizes[1] / seconds[1], link_rate)
    # What sequences take besides plans count by itself.
    begun = KEYS_OF_SEQUENCE[policy.cache_bits] * (sizes[1] - sizes[0]) / (calls.contexts[1] - calls.contexts[0])
    return AttentionInPasses(max(0.0, seconds[0] - slope * (sizes[0] + begun)), 1 / slope, link_rate)


def rate_beside(copies: list[Span], others: list[Span]) -> float:
    """Bytes a second of ``copies``, each counted by how much of it one of ``others``, which do not overlap each
    other, ran beside; infinite for none."""
    beside = [
        sum(max(0.0, min(copy.end, other.end) - max(copy.start, other.start)) for other in others) for copy in copies
    ]
    shares = [
        seconds / (copy.end - copy.start) if copy.end > copy.start else 0.0
        for seconds, copy in zip(beside, copies, strict=True)
    ]
    moved = sum(share * copy.num_bytes for share, copy in zip(shares, copies, strict=True))
    return moved / sum(beside) if moved > 0 else math.inf


class HostPasses:
    """Decode passes of a few policies, measured in rounds: of each the fastest counts, and the machine's other users
    come and go between rounds."""

    def __init__(self, policies: dict[str, Policy], models: SmallModels, of_few: dict[str, Policy]) -> None:
        """of_few: measured with few layers only."""
        cells = [(name, layers) for name in policies for layers in (FEW, MANY)] + [(name, FEW) for name in of_few]
        policies = policies | of_few
        with contextlib.ExitStack() as stack:
            timed = [stack.enter_context(decode_passes(layers, policies[name], models)) for name, layers in cells]
            rounds = [[seconds() for seconds in timed] for _ in range(ROUNDS)]
        self.seconds = {cell: min(times) for cell, times in zip(cells, zip(*rounds, strict=True), strict=True)}

    def layer_seconds(self, name: str) -> float:
        """Returns the extra seconds per layer."""
        return (self.seconds[name, MANY] - self.seconds[name, FEW]) / (MANY - FEW)


def python_rates(passes: HostPasses, policies: dict[str, Policy]) -> dict[str, float]:
    """``pass_seconds``, ``sequence_seconds`` and ``launch_seconds`` by non-negative least squares over ``policies``;
    the layers of a graph cost the host nothing, and the GPU what these small ones take."""
    terms, seconds = [], []
    for name, policy in policies.items():
        for layers in (FEW, MANY):
            ticks, one_graph = policy.num_gpu_batches * (layers + 1), policy.num_gpu_batches == 1
            terms.append([1, policy.block_size, ticks * (not one_graph), ticks * one_graph])
            seconds.append(passes.seconds[name, layers])
    # Relative errors: a pass of ten layers is not five times as important as one of two.
    found = non_negative(np.array(terms) / np.array(seconds)[:, None], np.ones(len(seconds)))
    return dict(zip(("pass_seconds", "sequence_seconds", "launch_seconds"), found.tolist()[:3], strict=True))


@torch.inference_mode()
def host_rates(device: torch.device, phases: Phases | None = None) -> dict[str, float]:
    """What passes of small models tell, as fields of `policy.hardware.Hardware`.

    ``pass_seconds``, ``sequence_seconds``, ``launch_seconds``: by least squares over a few shapes. ``graph_seconds``,
    ``piece_seconds``: 0 without a GPU, where there are no graphs. ``away_sequence_seconds``: from blocks of few and of
    many sequences whose cache is elsewhere. What else a tick may launch `policy.launches` counts: measured as what
    passes that do it take longer, it was 0 to 1 ms on hosts that change by a factor of two from one second to the next.
    ``exchange_seconds`` and ``synchronize_seconds``: from how passes of one micro-batch grow with the layers.
    ``request_seconds``, ``prompt_token_seconds``, and what a page adds to ``sequence_seconds``: from passes that are
    composed and not run.
    ``cpu_attention_seconds`` and, with a GPU, ``cpu_attention_during_h2d``, ``h2d_during_cpu_attention`` and ALONE.
    """
    gpu, phases = device.type == "cuda", phases or Phases()
    baseline = {"few": resident(8), "many": resident(MANY_SEQUENCES)}
    if gpu:
        baseline |= {f"graph of {sequences}": resident(sequences, 1) for sequences in GRAPHED}
    others = {
        "with_cpu_attention": with_cpu_attention(8),
        "in turn": replace(with_cpu_attention(8), overlap=False),
    }
    away = {f"{name} away": replace(baseline[name], cache=ON_CPU) for name in ("few", "many")}
    with contextlib.closing(SmallModels(device, head_dim(device))) as models:
        with phases.of("passes of small models"), one_thread():
            passes = HostPasses(baseline | others, models, away)
        with phases.of("what comes and goes"), one_thread():
            composing = composing_seconds(models)
        rates = {"graph_seconds": 0.0, "piece_seconds": 0.0}
        if gpu:
            with phases.of("layers in graphs and in pieces"):
                rates |= {"graph_seconds": graph_seconds(device), "piece_seconds": piece_seconds(models)}
    rates |= python_rates(passes, baseline)
    layer = {name: passes.layer_seconds(name) for name in others}
    more = baseline["many"].block_size - baseline["few"].block_size
    each = (passes.seconds["many away", FEW] - passes.seconds["few away", FEW]) / more
    differences = {
        "exchange_seconds": layer["with_cpu_attention"] - rates["launch_seconds"],
        "synchronize_seconds": layer["in turn"] - layer["with_cpu_attention"],
        "away_sequence_seconds": each - rates["sequence_seconds"],
    }
    rates |= {name: max(0.0, seconds) for name, seconds in differences.items()}
    rates = with_composing(rates, composing)
    if not gpu:
        return rates | {"cpu_attention_seconds": attention_seconds(device)}
    calls = AttentionCalls.for_memory(host_memory_bytes())
    with phases.of("attention on the CPU in passes"):
        beside, alone = (attention_in_passes(device, weights, calls) for weights in (ON_CPU, ON_GPU))
    return rates | {
        "cpu_attention_seconds": beside.call_seconds,
        "cpu_attention_during_h2d": min(beside.rate, alone.rate),
        "h2d_during_cpu_attention": beside.link_rate,
        ALONE: alone.rate,
    }
