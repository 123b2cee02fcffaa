"""The chosen policy beside policies that a person would try around it, each measured by the same job."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from benchmark.observed import ObservedLLM, fixed_by, measure, open_engine
from benchmark.policy_settings import Setting
from flexbatch.policy.policy import Policy, Split

NUM_NEIGHBORS = 10


def neighbors(policy: Policy) -> Iterator[tuple[str, Policy]]:
    """Policies around ``policy`` as a person would try them, the most telling first; whether they fit is for the
    caller to say."""
    b, k, w, c = policy.gpu_batch_size, policy.num_gpu_batches, policy.weights, policy.cache

    def sizes(batch: float, count: int) -> tuple[str, Policy]:
        batch = max(1, round(batch))
        return f"{batch} x {count}", dataclasses.replace(policy, gpu_batch_size=batch, num_gpu_batches=max(1, count))

    def attention(share: float) -> tuple[str, Policy]:
        share = min(1.0, max(0.0, share))
        return f"CPU attention {share:.0%}", dataclasses.replace(policy, cpu_attention=share)

    yield sizes(b / 2, k)
    yield sizes(2 * b, k)
    yield sizes(b, k + 1)
    yield sizes(b, k - 1)
    if c.cpu:
        yield attention(0.0)
        yield attention(1.0)
    yield with_weights(policy, -min(0.1, w.gpu))
    yield with_weights(policy, min(0.05, w.cpu))
    yield sizes(b / 2, 2 * k)
    yield sizes(0.75 * b, k)
    if c.cpu:
        yield attention(policy.cpu_attention - 0.25)
        yield attention(policy.cpu_attention + 0.25)
    yield with_cache(policy, min(0.1, c.cpu))
    yield with_cache(policy, -min(0.1, c.gpu))
    if c.disk:
        yield (
            "no cache on disk",
            dataclasses.replace(
                policy, cache=Split(c.gpu, 1 - c.gpu, 0.0), gpu_batch_size=max(1, int(b * (c.gpu + c.cpu)))
            ),
        )
    budget = policy.prompt_tokens_per_micro_batch
    yield f"prompt budget {budget // 2}", dataclasses.replace(policy, prefill_budget=max(32, budget // 2))
    yield f"prompt budget {2 * budget}", dataclasses.replace(policy, prefill_budget=2 * budget)
    yield (
        f"prompt chunk {policy.prefill_chunk // 2}",
        dataclasses.replace(policy, prefill_chunk=max(16, policy.prefill_chunk // 2)),
    )
    yield f"prompt budget {budget // 4}", dataclasses.replace(policy, prefill_budget=max(32, budget // 4))
    for factor in (0.9, 1.1, 0.6, 1.25):
        yield sizes(factor * b, k)


def with_weights(policy: Policy, moved: float) -> tuple[str, Policy]:
    """``moved`` of the weights go from the CPU to the GPU."""
    w = policy.weights
    split = Split(w.gpu + moved, w.cpu - moved, w.disk)
    return f"weights on the GPU {split.gpu:.0%}", dataclasses.replace(policy, weights=split)


def with_cache(policy: Policy, moved: float) -> tuple[str, Policy]:
    """``moved`` of the cache goes from the CPU to the GPU."""
    c = policy.cache
    split = Split(c.gpu + moved, c.cpu - moved, c.disk)
    return f"cache on the GPU {split.gpu:.0%}", dataclasses.replace(policy, cache=split)


def run_neighborhood(setting: Setting, hardware: str, fixed: dict[str, Any]) -> dict[str, Any]:
    """The chosen policy and NUM_NEIGHBORS around it that fit, each by the same job; the chosen one again at the
    end."""
    tried: list[dict[str, Any]] = []

    def attempt(llm: ObservedLLM, name: str) -> None:
        record = measure(llm, setting)
        tried.append(
            {
                "name": name,
                **{
                    key: record[key]
                    for key in (*fixed_by(llm.policy), "tokens_per_second", "predicted_then", "seconds")
                },
            }
        )
        print(
            f"  {name}: {record['tokens_per_second']:.1f} tok/s, predicted {record['predicted_then']:.1f}",
            file=sys.stderr,
            flush=True,
        )

    candidates: dict[Policy, str] = {}
    try:
        with open_engine(setting, hardware, fixed) as llm:
            chosen = llm.policy
            attempt(llm, "chosen")
            # A block of more sequences than the job has is the block of them all.
            largest = max(chosen.block_size, setting.num_prompts)
            for name, policy in neighbors(chosen):
                new = policy != chosen and policy not in candidates and policy.block_size <= largest
                if new and llm.fits(policy) and len(candidates) < NUM_NEIGHBORS:
                    candidates[policy] = name
            for policy, name in candidates.items():
                if policy.weights == chosen.weights:
                    llm.use(policy)
                    attempt(llm, name)
            llm.use(chosen)
            attempt(llm, "chosen")
        for policy, name in candidates.items():
            if policy.weights != chosen.weights:
                with open_engine(setting, hardware, fixed_by(policy)) as llm:
                    attempt(llm, name)
    except TimeoutError as error:
        # What was measured counts.
        return {"model": setting.model, "tried": tried, "cut": str(error)}
    return {"model": setting.model, "gpu_memory": setting.memory[0], "cpu_memory": setting.memory[1], "tried": tried}
