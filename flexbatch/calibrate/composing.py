"""What comes and goes costs the host between passes: sequences that are admitted and end, tokens of their prompts, and
pages that they take as they grow.

Passes of small models tell what a pass and a sequence in flight cost, and hardly this: what a request cost was a small
difference of long times, of prompts of four tokens whose answers end before they need a second page. On an H200's host
passes in pieces took 1 to 2.5 ms more between two of them than was planned, in 11 jobs of models of 1 to 15 billion,
and by their loads it was 0.7 us for a token of a prompt, 0.06 ms for a request and 6 us for each sequence that decodes.
So here nothing is computed: a scheduler composes passes, their inputs are sent, and it is given tokens at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch

from flexbatch.calibrate.fits import non_negative
from flexbatch.calibrate.passes import SmallJob, SmallModels, resident, runner_of
from flexbatch.execution.pass_batch import DecodedTokens
from flexbatch.execution.runner import Runner
from flexbatch.execution.scheduler import Scheduler
from flexbatch.execution.sequence import Sequence
from flexbatch.policy.limits import PAGE_TOKENS
from flexbatch.policy.policy import Policy

BLOCK, TOKEN = 64, 5
LAYERS = 2
"""Of a model that other passes are timed with: none of them computes anything."""
BESIDE_TURNS = 0.5
"""Of a request, beside what it costs in turns: `LLM.generate` takes it in, and gives its completion. On a processor of
two cores 0.05 ms, where turns took 0.11; 0.06 ms in the jobs on the H200."""
OBSERVED = 0.14
"""Of a pass, beside what the host takes for it: the run is compared with its plan, and counted. In those jobs 0.14 ms a
pass, where the profile had 1.0."""
ROUNDS = 3
"""Of every turn the fastest counts: turns are the same in each, and other users of the host come and go."""
JOBS = (
    SmallJob(3 * BLOCK, PAGE_TOKENS, 3),  # requests that come and go, of a page each
    SmallJob(2 * BLOCK, 32 * PAGE_TOKENS, 3),  # tokens of prompts
    SmallJob(BLOCK, PAGE_TOKENS, 2 + 2 * PAGE_TOKENS),  # pages that are taken, by all in the same pass
)
PASS_REQUESTS = 8
"""Whose prompts a pass brings."""


@dataclass(frozen=True)
class ComposedTurn:
    """What came and went between two passes."""

    passes: int
    decoding: int
    requests: float
    """Of each a third when it is admitted, when its prompt is complete, and when it ends."""
    prompt_tokens: float
    """Of each half when its request is admitted, and half when it is read."""
    pages: int
    """That sequences took which decode."""


def turns(runner: Runner, policy: Policy, job: SmallJob) -> Iterator[tuple[ComposedTurn, float]]:
    """The turns of a job, and the seconds of each."""
    arrivals = (Sequence(request, sequence_id=request.index) for request in job.requests)
    scheduler = Scheduler(policy, runner.cache, arrivals, runner.sizes.max_micro_batch_tokens)
    builder, uploads = runner.executor.builder, runner.executor.uploads
    while True:
        before, began = scheduler.num_sequences, time.perf_counter()
        if not scheduler.has_work():
            return
        admitted = scheduler.num_sequences - before
        batch = scheduler.next_pass()
        uploads.begin_pass()
        for queries in batch.micro_batches:
            builder.build(queries)
        complete = [each for each in batch.others if each.start + each.num_tokens >= each.num_prompt_tokens]
        ids = [id for tokens in batch.decoding for id in tokens.sequence_ids.tolist()]
        ids += [each.sequence_id for each in complete]
        scheduler.commit(batch, {}, DecodedTokens(ids, [TOKEN] * len(ids)))
        ended, seconds = len(scheduler.take_finished()), time.perf_counter() - began
        pages = sum(int(np.count_nonzero(tokens.starts % PAGE_TOKENS == 0)) for tokens in batch.decoding)
        requests = (admitted + len(complete) + ended) / 3
        prompt_tokens = (admitted * job.prompt_tokens + batch.num_prompt_tokens) / 2
        yield ComposedTurn(1, batch.num_decoding, requests, prompt_tokens, pages), seconds


@torch.inference_mode()
def composing_seconds(models: SmallModels) -> dict[str, float]:
    """Seconds of a request, of a token of a prompt and of a page that a sequence takes which decodes: ``request``,
    ``prompt_token`` and ``page``."""
    longest = max(JOBS, key=lambda job: job.prompt_tokens)
    policies = [
        replace(resident(BLOCK, 1), prefill_chunk=tokens, prefill_budget=PASS_REQUESTS * tokens)
        for tokens in (job.prompt_tokens for job in (longest, *JOBS))
    ]
    timed = list[tuple[ComposedTurn, float]]()
    with runner_of(models.of(LAYERS), policies[0], longest.lengths) as runner:
        for policy, job in zip(policies[1:], JOBS, strict=True):
            rounds = [list(turns(runner, policy, replace(job, seed=seed))) for seed in range(ROUNDS)]
            timed += [(same[0][0], min(seconds for _, seconds in same)) for same in zip(*rounds, strict=True)]
    return fitted(timed)


def fitted(timed: list[tuple[ComposedTurn, float]]) -> dict[str, float]:
    """By non-negative least squares of relative errors: turns in which a block is filled take ten times as long."""
    seconds = np.array([each for _, each in timed])
    terms = np.array([astuple(turn) for turn, _ in timed]) / seconds[:, None]
    _, _, request, prompt_token, page = non_negative(terms, np.ones(len(timed))).tolist()
    return {"request": request, "prompt_token": prompt_token, "page": page}


def with_composing(rates: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    """Fields of `policy.hardware.Hardware`, with those of `composing_seconds`: pages grow by a token a pass."""
    return rates | {
        "pass_seconds": rates["pass_seconds"] * (1 + OBSERVED),
        "sequence_seconds": rates["sequence_seconds"] + seconds["page"] / PAGE_TOKENS,
        "request_seconds": seconds["request"] * (1 + BESIDE_TURNS),
        "prompt_token_seconds": seconds["prompt_token"],
    }
