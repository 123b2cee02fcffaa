"""What a layer costs in passes that are CUDA graphs, whole or in pieces."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import median

import torch

from flexbatch.calibrate.passes import (
    PROMPT_TOKENS,
    SmallJob,
    SmallModels,
    job_runner,
    resident,
    runner_of,
    small_arch,
    turns_of,
)
from flexbatch.calibrate.replays import recorded_seconds, replayed_seconds
from flexbatch.execution.runner import Runner
from flexbatch.models.specs import weight_specs
from flexbatch.policy.decode_graphs import RECORDING_PASSES
from flexbatch.trace import Tracer

HEAD_DIM, HEADS = 128, 32
"""Of layers as wide as those of models of 7 billion."""
SEQUENCES = 8
FEW, MANY = 2, 5
"""Of these layers."""
FEW_PIECES, MANY_PIECES = 2, 10
"""Of layers of a single head, as of the models whose passes tell what the host takes."""
RECORDING, READING = RECORDING_PASSES, 7
"""Passes of a prompt that are launched kernel by kernel until the last of them records pieces, and that are timed.
With three of the former most of the others were no pieces: 0.6 to 0.95 ms a layer were found on four H200 where pieces
take 0.2, and plans took a pass of Llama-3-8B with prompts for 33 ms where jobs took less than 13."""
ROUNDS = 2
RECORDED_BY, REPLAYS = 5, 20
"""Tokens of the answers of a job that has a graph at its end, and how often that is replayed in a row."""
WIDTH = 8192
"""Of the product whose rate that of a layer's products is compared with, which the profile's curve is measured by."""


def graph_seconds(device: torch.device) -> float:
    """Returns the seconds of a layer in a graph beside what its products take at the rate of a large one, by the
    device's clock.

    Among small kernels each product begins and ends more slowly than behind one like it. Of layers too small to compute
    anything 0.020 to 0.025 ms were found on H100, and 0.033 to 0.046 were missing in the graphs of OPT-6.7B,
    Llama-3-8B and Falcon-7B.
    """
    elements = sum(spec.numel for spec in weight_specs(small_arch(FEW, HEAD_DIM, HEADS)) if spec.layer == 0)
    whole = (replay_seconds(MANY, device) - replay_seconds(FEW, device)) / (MANY - FEW)
    return max(0.0, whole - elements * element_seconds(device))


def replay_seconds(num_layers: int, device: torch.device) -> float:
    """Of the graph of a decode pass, replayed by itself: what is copied to its inputs before takes the host longer than
    a layer."""
    policy, arch, job = resident(SEQUENCES, 1), small_arch(num_layers, HEAD_DIM, HEADS), SmallJob(SEQUENCES)
    with job_runner(arch, policy, device, Tracer(), job) as runner:
        turns_of(runner, policy, Tracer(), replace(job, new_tokens=RECORDED_BY))
        graphs = runner.executor.graphs
        assert graphs is not None and graphs.captured, "no pass was recorded"
        return replayed_seconds(next(reversed(graphs.captured.values())).graph.replay, device, REPLAYS)


def element_seconds(device: torch.device) -> float:
    """Of the weights of a large product with as many tokens."""
    weight = torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16, device=device)
    x = torch.ones(SEQUENCES, WIDTH, dtype=weight.dtype, device=device)
    return recorded_seconds(partial(torch.nn.functional.linear, x, weight), device) / weight.numel()


def piece_seconds(models: SmallModels) -> float:
    """Returns the extra seconds per layer of passes on the GPU that run in pieces: of those that read prompts, whose
    attention is another kernel than that of single tokens. Of these 0.19 ms were found where jobs took 0.25 to 0.32."""
    policy = replace(resident(SEQUENCES, 1), piece_tokens=SEQUENCES * PROMPT_TOKENS)

    def of_pass(num_layers: int) -> float:
        found = []
        first, later = (SmallJob(SEQUENCES, PROMPT_TOKENS * (passes + READING), 2) for passes in (RECORDING, 1))
        with runner_of(models.of(num_layers), policy, first.lengths) as runner:
            for job in (first, *[later] * (ROUNDS - 1)):
                turns = turns_of(runner, policy, Tracer(), job)
                last = job.prompt_tokens // PROMPT_TOKENS
                found.append(median(seconds for _, seconds in turns[last - READING : last]))
            check_pieces(runner)
        return min(found)

    return max(0.0, (of_pass(MANY_PIECES) - of_pass(FEW_PIECES)) / (MANY_PIECES - FEW_PIECES))


def check_pieces(runner: Runner) -> None:
    """All passes that were timed ran in pieces."""
    pieces = runner.executor.pieces
    assert pieces is not None and pieces.passes >= READING, "passes were launched kernel by kernel"
