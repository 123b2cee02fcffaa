"""The passes of a whole job under a policy: walked sequence by sequence, or for a long job a part of it, scaled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flexbatch.policy.admission import CacheSizes, cache_sizes, micro_batch_tokens, num_pages
from flexbatch.policy.expected_pages import ExpectedPages
from flexbatch.policy.layer_window import LayerWindow
from flexbatch.policy.pass_load import PassLoad, reserved_tokens, steady_load
from flexbatch.policy.policy import Policy, Split
from flexbatch.policy.prefix_walk import PrefixWalker
from flexbatch.policy.walk import all_passes, walk
from flexbatch.policy.walked import Walk
from flexbatch.policy.workload import RequestLengths, Workload

WALKED, FEW_BLOCKS = 1024, 8
"""Sequences that are walked one by one while policies are compared; four times as many of a job of few blocks, whose
end depends on its longest sequences. Of a longer job a part is walked."""
ESTIMATED = 128
"""Sequences of a job for which pages of likely answers are estimated anew in every pass while policies are compared:
that takes ten times as long as the rest of a walk. Of 800 a search took 5 to 8 s, and chose the same block."""
BLOCKS, LEAST = 10, 640
"""Of a longer job, blocks and sequences that are walked, at least. The passes from the end of the second block until
the last one is all that is left are taken for the rest."""
SLOTS = 64
"""Sequences of a block that stand for all of a larger one in the walk of a long job."""
EVERYWHERE = Split(1.0, 0.0)


@dataclass(frozen=True)
class JobPasses:
    """The passes of a job, as rows of alike ones in order."""

    load: PassLoad
    counts: np.ndarray
    """Passes that each row stands for."""
    tokens: float
    """Generated in all of them."""
    in_flight: np.ndarray
    tail: np.ndarray
    """Which rows come after the last admission, with fewer sequences than the block held."""

    @classmethod
    def of_walk(cls, walked: Walk, generated: float) -> JobPasses:
        return cls(walked.load, walked.counts, generated, walked.in_flight, walked.tail)

    @property
    def tail_passes(self) -> float:
        return float(self.counts[self.tail].sum())

    @property
    def tail_sequences(self) -> float:
        """In flight in the average pass of the tail."""
        passes = self.tail_passes
        return float((self.counts * self.in_flight)[self.tail].sum()) / passes if passes else 0.0


def passes_of(
    workload: Workload,
    policy: Policy,
    exact: bool = True,
    sizes: CacheSizes | None = None,
    window: LayerWindow | None = None,
) -> JobPasses:
    """The whole job, or for a job without end its average pass.

    exact: with the pages of every tier, in the order of the requests, where the workload knows that; else slots alone
    are counted, and of more than WALKED sequences a part. sizes: the pools that a block has (default: as it is made for
    the job, with the ``window`` of some layers).
    """
    if workload.num_sequences is None:
        load, finished = steady_load(workload, policy)
        load = PassLoad.together([load])
        none, some = np.zeros(1, dtype=bool), np.full(1, float(policy.block_size))
        return JobPasses(load, np.ones(1), finished * workload.mean_output, some, none)
    tokens = workload.num_sequences * workload.mean_output
    if exact and workload.in_order is not None:
        likely = workload.grows and (sizes is not None or workload.num_sequences <= ESTIMATED)
        expected = ExpectedPages(workload.in_order[1], limit=workload.most_output) if likely else None
        found = sizes or pools(workload, policy, likely, window)
        walked = walk(workload.requests, policy, found, micro_batch_tokens(policy), expected)
    elif workload.num_sequences <= min(4 * WALKED, max(WALKED, FEW_BLOCKS * policy.block_size)):
        walked = walk(workload.requests, dataclasses.replace(policy, cache=EVERYWHERE))
    else:
        walked, counts = long_job(workload, policy)
        return JobPasses(walked.load, counts, tokens, walked.in_flight, walked.tail)
    return JobPasses.of_walk(walked, tokens)


def passes_with_prefixes(
    requests: Sequence[RequestLengths], policy: Policy, sizes: CacheSizes, kept: Mapping[str, Sequence[int]]
) -> JobPasses:
    """The passes of a whole job whose requests know how their prompts begin, in pools that a block has, and that have
    kept beginnings of earlier ones."""
    walked = all_passes(PrefixWalker(requests, policy, sizes, micro_batch_tokens(policy), kept))
    return JobPasses.of_walk(walked, float(sum(request.output for request in requests)))


def pools(workload: Workload, policy: Policy, likely: bool, window: LayerWindow | None = None) -> CacheSizes:
    """The pages of a block that is made for the job. likely: for likely answers."""
    block = min(policy.block_size, len(workload.requests))
    longest = workload.longest_pages[:block]
    if likely:
        # One that reaches all that it may, and others as they are met.
        longest = [longest[0], *[num_pages(math.ceil(reserved_tokens(workload, policy)))] * (block - 1)]
    return cache_sizes(policy, longest, window=window)


def long_job(workload: Workload, policy: Policy) -> tuple[Walk, np.ndarray]:
    """A part of a job, and how many passes of the whole each of its rows stands for. Of a large block, each sequence
    of a smaller one stands for several."""
    total, batches = workload.num_sequences, policy.num_gpu_batches
    assert total is not None
    batch = max(1, min(policy.gpu_batch_size, math.ceil(SLOTS / batches)))
    scale = policy.gpu_batch_size / batch
    budget = max(1, round(policy.prompt_tokens_per_micro_batch / scale))
    small = dataclasses.replace(policy, cache=EVERYWHERE, gpu_batch_size=batch, prefill_budget=budget)
    count = max(1, min(round(total / scale), max(LEAST, BLOCKS * batch * batches)))
    walked = walk(workload.drawn(count), small, None, max(1, round(micro_batch_tokens(policy) / scale)) + batch)
    finished = np.cumsum(walked.counts * np.asarray(walked.load.finished_prompts))
    counts, block = walked.counts.copy(), small.block_size
    begin, end = np.searchsorted(finished, [min(2 * block, count / 4), count - min(block, count / 4)])
    between = finished[end] - finished[begin]
    if between > 0:
        counts[begin + 1 : end + 1] *= 1 + max(0.0, total / scale - count) / between
    in_flight = walked.in_flight * scale
    return dataclasses.replace(walked, load=walked.load.scaled(scale), in_flight=in_flight), counts
