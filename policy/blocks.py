"""Sizes of blocks that a search weighs: micro-batches, how many of them, and prompt tokens of each in a pass."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from flexbatch.policy.candidates import ON_GPU
from flexbatch.policy.footprint import capacity, memory_rows
from flexbatch.policy.pass_load import Lengths
from flexbatch.policy.policy import Policy
from flexbatch.policy.search import Search
from flexbatch.policy.workload import Workload

GRID_BATCHES = tuple(2**i for i in range(11))
GRID_COUNTS = (1, 4, 16, 64)
MIN_BUDGET = 256
"""Prompt tokens that a micro-batch may always bring: fewer would cut prompts into crumbs to save little memory."""
FILLS = (1.0, 0.5, 0.25, 0.0)
"""How fast an empty block fills: the share of a sequence's stay over which prompts are spread. 1 keeps every pass
alike, 0 brings all at once."""
READ_AT_ONCE = 3.0
"""Standard deviations of the prompt tokens of a micro-batch, beyond their mean, that it may bring where all are to be
read in as few passes as there are chunks. Of 1,009 prompts of 4 to 32 tokens whose answers are one token each,
micro-batches that had room for the mean left a few for a second pass, which takes as long as the first."""
MOST_ON_GPU = 4096
"""Sequences of the largest block on the GPU that is looked for."""
FEW_WAVES = 8
"""Waves of a job from which a small last one costs too little to look for others."""


def coarse(budget: float) -> int:
    """``budget`` or up to a thirty-second more: plans whose budgets differ by a few tokens take equally long, and each
    would be placed and priced."""
    step = 2 ** max(0, math.floor(math.log2(max(1.0, budget))) - 5)
    return step * math.ceil(budget / step)


def budget_of(workload: Workload, policy: Policy, fill: float) -> int:
    """Prompt tokens of a micro-batch in a pass so that a block fills within ``fill`` of a sequence's stay; 0 when
    that limits nothing."""
    lengths = Lengths.of(workload, policy)
    passes = max(lengths.prompt_passes, fill * lengths.residence)
    tokens = policy.gpu_batch_size * lengths.prompt
    if passes <= lengths.prompt_passes:
        # One prompt that is left for another pass costs a pass: as much more as micro-batches differ, whose sequences
        # are drawn from the job's. Of longer ones than a chunk the rest waits anyway.
        rest = 1 - policy.gpu_batch_size / (workload.num_sequences or math.inf)
        deviation = float(np.minimum(workload.columns[0], policy.prefill_chunk).std())
        tokens += READ_AT_ONCE * math.sqrt(policy.gpu_batch_size * max(0.0, rest)) * deviation
    budget = max(MIN_BUDGET, coarse(tokens / passes))
    return budget if budget < policy.gpu_batch_size * policy.prefill_chunk else 0


def block_policy(search: Search, template: Policy, batch: int, count: int, fill: float) -> Policy:
    """``template`` with the sizes of a block; what the user fixed stays."""
    constraints = search.constraints
    batch, count = constraints.gpu_batch_size or batch, constraints.num_gpu_batches or count
    if search.workload.num_sequences is not None:
        # Sequences beyond the job's would only reserve memory.
        batch = constraints.gpu_batch_size or min(batch, search.workload.num_sequences)
        count = constraints.num_gpu_batches or min(count, math.ceil(search.workload.num_sequences / batch))
    policy = dataclasses.replace(template, gpu_batch_size=batch, num_gpu_batches=count)
    budget = (
        budget_of(search.workload, policy, fill) if constraints.prefill_budget is None else constraints.prefill_budget
    )
    return dataclasses.replace(policy, prefill_budget=budget)


def first_fill(search: Search, block: float) -> float:
    """A job of few blocks loses more by filling slowly than by unequal passes."""
    total = search.workload.num_sequences
    return 1.0 if total is None or total > 4 * block else 0.5


def grid(sequences: float, step: int = 1) -> list[tuple[int, int]]:
    """Sizes in powers of two (with ``step`` 2, of four) and counts in powers of four, those nearest to ``sequences`` in
    flight first, so that the rest is pruned early."""
    pairs = itertools.product(GRID_BATCHES[::step], GRID_COUNTS)
    return sorted(pairs, key=lambda pair: (abs(math.log2(pair[0] * pair[1] / sequences)), abs(pair[1] - 4)))


def on_gpu(search: Search, template: Policy) -> list[tuple[int, int]]:
    """The size of the largest block with everything on the GPU, if there is one. It launches a pass as one graph, and
    is a peak of its own: blocks of about the best offloaded one's size say nothing of it."""
    if search.hardware.device != "cuda" or template.cpu_attention or template.cpu_experts or template.cache.disk:
        return []
    budget, most = capacity(search.hardware)["gpu"], search.workload.num_sequences or MOST_ON_GPU

    def exceeds(batch: int) -> bool:
        policy = block_policy(search, template, batch, 1, first_fill(search, batch))
        rows = memory_rows(search.shape, search.hardware, search.workload, policy)["gpu"]
        return float(np.sum(list(rows.values()), axis=0) @ ON_GPU) > budget

    batch = bisect.bisect_left(range(1, min(most, MOST_ON_GPU) + 1), True, key=exceeds)
    return [(batch, 1)] if batch else []


def neighbors(policy: Policy, total: int | None) -> Iterator[tuple[int, int]]:
    """Other sizes around a policy's: by one, by an eighth and by a third, the same block cut differently, and those
    that take the job in whole waves."""
    b, k = policy.gpu_batch_size, policy.num_gpu_batches
    for factor in (1.34, 0.75, 1.13, 0.89):
        yield max(b + (1 if factor > 1 else -1), round(b * factor)), k
        yield b, max(k + (1 if factor > 1 else -1), round(k * factor))
    yield b + 1, k
    yield b - 1, k
    yield math.ceil(b * k / (k + 1)), k + 1
    if k > 1:
        yield b * k // (k - 1), k - 1
    if total is not None:
        yield from ((batch, k) for batch in balanced(total, b, k) if batch != b)


def balanced(total: int, batch: int, count: int) -> list[int]:
    """Sizes of ``count`` micro-batches that take a job in whole waves of equal size: as many as ``batch`` takes, one
    fewer, one more. Of 184 sequences a block of 87 leaves 10 for a third wave, which takes as many passes as the
    others; 92 leaves none."""
    waves = math.ceil(total / (batch * count))
    if waves > FEW_WAVES:
        return []
    return [math.ceil(math.ceil(total / each) / count) for each in (waves, waves - 1, waves + 1) if each]
