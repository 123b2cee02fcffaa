"""What the engine's Python costs: measured with passes that compute next to nothing, and told apart by their shapes."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexbatch.calibrate import graphs, host, passes, replays
from flexbatch.policy.decode_graphs import RECORDING_PASSES
from flexbatch.policy.policy import Policy, Split
from flexbatch.trace import Span, Tracer

CPU = torch.device("cpu")


def let_passes_take(monkeypatch: pytest.MonkeyPatch, seconds: Any, turns: Any = None) -> None:
    """seconds: of a decode pass, by layers, policy and device; turns: of a job, by layers, policy and the job."""

    @contextlib.contextmanager
    def runner(model: passes.SmallModel, *told: Any) -> Iterator[Any]:
        yield SimpleNamespace(arch=model.arch, executor=SimpleNamespace(pieces=SimpleNamespace(passes=99)))

    @contextlib.contextmanager
    def timed(num_layers: int, policy: Policy, models: passes.SmallModels) -> Iterator[Any]:
        yield lambda: seconds(num_layers, policy, models.device)

    monkeypatch.setattr(host, "decode_passes", timed)
    if turns is not None:
        monkeypatch.setattr(graphs, "runner_of", runner)
        monkeypatch.setattr(
            graphs, "turns_of", lambda runner, policy, tracer, job: turns(runner.arch.num_layers, policy, job)
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_cost_is_found_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(num_layers: int, policy: Policy, device: torch.device) -> float:
        if policy.num_gpu_batches == 1 and policy.cpu_attention == 0:
            return 2e-3 + 1e-5 * policy.block_size + 2e-5 * (num_layers + 1)
        ticks = (num_layers + 1) * policy.num_gpu_batches
        more = 5e-4 * (policy.cpu_attention > 0) + 7e-4 * (not policy.overlap)
        more += policy.num_gpu_batches * 8e-4 * (policy.cache.cpu - policy.cpu_attention)
        each = 1e-5 if policy.cache.gpu else 5e-5
        return 2e-3 + each * policy.block_size + 3e-4 * ticks + more * num_layers

    attention = {0: host.AttentionInPasses(6e-4, 1e11, 5e10), 1: host.AttentionInPasses(5e-4, 1.2e11, math.inf)}
    let_passes_take(monkeypatch, seconds)
    composing = {"request": 2e-5, "prompt_token": 3e-7, "page": 1.6e-5}
    monkeypatch.setattr(host, "composing_seconds", lambda models: composing)
    monkeypatch.setattr(host, "attention_seconds", lambda device: 4e-4)
    monkeypatch.setattr(host, "graph_seconds", lambda device: 4e-5)
    monkeypatch.setattr(host, "piece_seconds", lambda models: 7e-5)
    monkeypatch.setattr(host, "attention_in_passes", lambda device, weights, calls: attention[weights.gpu])
    found = host.host_rates(torch.device(device))
    wanted = {
        "pass_seconds": 2e-3 * 1.14,
        "sequence_seconds": 1e-5 + 1.6e-5 / 16,
        "away_sequence_seconds": 4e-5,
        "launch_seconds": 3e-4,
        "graph_seconds": 4e-5 if device == "cuda" else 0.0,
        "piece_seconds": 7e-5 if device == "cuda" else 0.0,
        "exchange_seconds": 5e-4,
        "synchronize_seconds": 7e-4,
        "request_seconds": 3e-5,
        "prompt_token_seconds": 3e-7,
        "cpu_attention_seconds": 6e-4 if device == "cuda" else 4e-4,
        **(
            {"cpu_attention_during_h2d": 1e11, "h2d_during_cpu_attention": 5e10, host.ALONE: 1.2e11}
            if device == "cuda"
            else {}
        ),
    }
    assert found == {name: pytest.approx(value) for name, value in wanted.items()}


def test_a_layer_of_a_graph_is_told_from_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of 168 million weights, and what their kernels take to begin and end; never less than nothing."""
    elements = 4096 * (3 * 4096 + 4096 + 3 * 8192)
    monkeypatch.setattr(graphs, "element_seconds", lambda device: 7e-13)
    for each in (4e-5, 0.0, -1e-4):
        layer = elements * 7e-13 + each
        monkeypatch.setattr(graphs, "replay_seconds", lambda layers, device, layer=layer: 3e-4 + layers * layer)
        assert graphs.graph_seconds(CPU) == pytest.approx(max(0.0, each), rel=0.02, abs=1e-8)


@pytest.mark.gpu
def test_what_is_recorded_takes_the_device_as_long_as_it_does() -> None:
    """A copy of 64 MiB, at the memory's rate and not at the host's; and a layer of a graph."""
    device = torch.device("cuda:0")
    source = torch.ones(1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / replays.recorded_seconds(lambda: target.copy_(source), device)
    assert 1e11 < rate < 2e13
    sustained = 2 * source.nbytes / replays.recorded_seconds(lambda: target.copy_(source), device, 0.05)
    assert rate / 3 < sustained < 2 * rate
    with torch.inference_mode():
        assert 1e-6 < graphs.graph_seconds(device) < 3e-4


def test_pieces_are_timed_while_prompts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first passes, which record them, nor those behind the prompts; of a round the median."""

    recorded = set()

    def turns(num_layers: int, policy: Policy, job: passes.SmallJob) -> list:
        assert policy.piece_tokens == job.num_requests * policy.prefill_chunk
        assert not job.prompt_tokens % policy.prefill_chunk
        reading = [1e-3 + 2e-4 * num_layers] * (job.prompt_tokens // policy.prefill_chunk)
        first = 1 if num_layers in recorded else RECORDING_PASSES
        recorded.add(num_layers)
        reading[:first], reading[-2] = [9.0] * first, 7.0
        return [(seconds, seconds) for seconds in [*reading, 8.0]]

    let_passes_take(monkeypatch, None, turns)
    with contextlib.closing(passes.SmallModels(CPU, 8)) as models:
        assert graphs.piece_seconds(models) == pytest.approx(2e-4)


@pytest.mark.parametrize("late", [False, True])
def test_the_fastest_of_all_rounds_counts(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user of the machine slows down the first half of the measurements, or the second."""
    calls = []

    def seconds(num_layers: int, policy: Policy, device: torch.device) -> float:
        calls.append(num_layers)
        return num_layers * (1e-3 if (len(calls) > 4) == late else 5e-3)

    let_passes_take(monkeypatch, seconds)
    timed = host.HostPasses({"one": passes.resident(8), "two": passes.resident(16)}, passes.SmallModels(CPU, 8), {})
    assert timed.layer_seconds("one") == timed.layer_seconds("two") == pytest.approx(1e-3)
    assert len(calls) == 8


def test_the_rate_of_copies_beside_attention() -> None:
    """A copy counts by the part of it that attention ran beside: of these the last not at all, and the first twice
    as much as the second."""
    copies = [
        Span("h2d", "weights 1", 0.0, 1.0, 40),
        Span("h2d", "weights 2", 1.0, 2.0, 70),
        Span("h2d", "weights 3", 3.0, 4.0, 1000),
    ]
    attention = [Span("cpu_attention", "cache 0.0", -1.0, 0.5), Span("cpu_attention", "cache 0.1", 0.5, 1.5)]
    assert host.rate_beside(copies, attention) == pytest.approx((40 + 0.5 * 70) / 1.5)
    assert host.rate_beside(copies[2:], attention) == host.rate_beside([], attention) == math.inf


@pytest.mark.slow
def test_costs_of_this_machine() -> None:
    """Finite and not negative, whoever else uses the machine: a busy one gives any of them 0. The number of threads
    is as before."""
    threads = torch.get_num_threads()
    found = host.host_rates(CPU)
    assert torch.get_num_threads() == threads
    names = {
        "sequence_seconds",
        "away_sequence_seconds",
        "launch_seconds",
        "pass_seconds",
        "exchange_seconds",
        "synchronize_seconds",
        "request_seconds",
        "prompt_token_seconds",
    }
    assert found.keys() == {*names, "graph_seconds", "piece_seconds", "cpu_attention_seconds"}
    assert all(0 <= seconds < math.inf for seconds in found.values()) and found["cpu_attention_seconds"] > 0
    # Sequences and ticks together cost something: passes of 128 sequences and ten layers take longer than none.
    assert found["sequence_seconds"] + found["launch_seconds"] + found["pass_seconds"] > 0


def test_jobs_in_one_runner_are_as_long_as_each_says() -> None:
    """A runner for the longest serves shorter ones before it, and the same again, on every tier; nothing that it has
    seen shortens what comes."""
    for policy in (
        passes.resident(1, 1),
        passes.resident(4),
        passes.with_cpu_attention(4, 2),
        replace(passes.resident(4), cache=host.ON_CPU),
    ):
        policy = replace(policy, prefill_chunk=16)
        longest = passes.SmallJob(policy.block_size, 48, 5)
        with (
            torch.inference_mode(),
            passes.job_runner(passes.small_arch(2, 8), policy, CPU, Tracer(), longest) as runner,
        ):
            for prompt, answer in ((32, 3), (48, 5), (4, 5), (4, 5)):
                turns = passes.turns_of(runner, policy, Tracer(), passes.SmallJob(policy.block_size, prompt, answer))
                assert len(turns) == -(-prompt // 16) + answer - 1
            runner.check()


@pytest.mark.parametrize("noise", range(20))
def test_costs_of_a_noisy_machine(noise: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that take up to fifty times as long as they should, by chance: what is found is still finite and not
    negative."""
    chance = random.Random(noise)

    def seconds(num_layers: int, policy, device) -> float:
        work = 1e-3 + 2e-5 * policy.block_size + 1e-4 * policy.num_gpu_batches * (num_layers + 1)
        return work * chance.choice((1, 1, 2, 50 * chance.random() + 1))

    let_passes_take(monkeypatch, seconds)
    monkeypatch.setattr(host, "attention_seconds", lambda device: chance.random())
    found = host.host_rates(CPU)
    assert all(0 <= value < math.inf for value in found.values())


def test_costs_of_a_quiet_machine_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes are made of comes out again, where nothing disturbs them."""

    def seconds(num_layers: int, policy, device) -> float:
        return 1e-3 + 2e-5 * policy.block_size + 1e-4 * policy.num_gpu_batches * (num_layers + 1)

    let_passes_take(monkeypatch, seconds)
    monkeypatch.setattr(host, "attention_seconds", lambda device: 1e-4)
    monkeypatch.setattr(host, "composing_seconds", lambda models: {"request": 0.0, "prompt_token": 0.0, "page": 0.0})
    found = host.host_rates(CPU)
    assert (found["pass_seconds"], found["sequence_seconds"]) == (pytest.approx(1.14e-3), pytest.approx(2e-5))
    assert found["launch_seconds"] == pytest.approx(1e-4) and found["exchange_seconds"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("weights", [host.ON_CPU, host.ON_GPU])
def test_attention_in_passes(weights: Split) -> None:
    """Calls of longer contexts take longer, at a rate that this machine's memory does not exceed."""
    found = host.attention_in_passes(CPU, weights, host.AttentionCalls(4, 8, 3, (16, 256)))
    assert 0 <= found.call_seconds < math.inf
    assert 0 < found.rate < 1e12
    # On two cores no copy may run beside attention.
    assert found.link_rate == math.inf or (weights.gpu == 0 and 0 < found.link_rate < 1e12)


def test_prompts_come_in_as_few_passes_as_those_of_the_longest_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that bring them measure nothing, and stream all weights: 32 prompts of 16 tokens are one, of 128 a pass
    holds 16. Behind the last of them every call is full."""
    turns, turns_of = list[int](), host.turns_of

    def counted(runner: Any, policy: Policy, tracer: Tracer, job: passes.SmallJob) -> list[tuple[float, float]]:
        found = turns_of(runner, policy, tracer, job)
        turns.append(len(found) - (job.new_tokens - 1))
        return found

    monkeypatch.setattr(host, "turns_of", counted)
    host.attention_in_passes(CPU, host.ON_GPU, host.AttentionCalls(16, 2, 1, (16, 128)))
    assert turns == [1, 2]


def test_attention_is_measured_with_what_memory_there_is() -> None:
    """Weights of 1.4 GB and 0.08 GB for each pair of sequences, within a quarter."""
    sequences = [host.AttentionCalls.for_memory(gib << 30).sequences for gib in (4, 6, 8, 16, 128)]
    assert sequences == sorted(sequences) and sequences[0] == 2 and sequences[-1] == host.ATTENDED_SEQUENCES
    assert 2 < sequences[2] < sequences[-1]


def test_what_is_sustained_is_the_second_half() -> None:
    """Of a card that slows down; one run is its own second half."""
    assert replays.second_half([1.0, 1.0, 2.0, 4.0]) == 3.0
    assert replays.second_half([1.0, 2.0, 3.0]) == 2.5 and replays.second_half([7.0]) == 7.0
