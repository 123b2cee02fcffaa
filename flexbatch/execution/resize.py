"""Other settings of a block that goes on: its cache, and whatever runs in it, stay."""

from __future__ import annotations

from flexbatch.execution.scheduler import Scheduler
from flexbatch.policy.policy import Policy


def fits(scheduler: Scheduler, policy: Policy) -> bool:
    """Whether what runs fits micro-batches of this size."""
    batches = scheduler.block.micro_batches
    return len(batches) == policy.num_gpu_batches and max(map(len, batches)) <= policy.gpu_batch_size


def resize(scheduler: Scheduler, policy: Policy) -> None:
    """Go on by a policy that has another number of sequences and of prompt tokens, and nothing else, between passes.
    The caller has checked that buffers hold it."""
    assert fits(scheduler, policy) and scheduler.policy.cache == policy.cache, (scheduler.policy, policy)
    scheduler.policy = scheduler.block.policy = policy
    scheduler.admission_limit, scheduler.rounds.passes = policy.block_size, policy.admission_passes
    scheduler.prefill_chunk, scheduler.prefill_budget = policy.prefill_chunk, policy.prompt_tokens_per_micro_batch


def adjust(scheduler: Scheduler, admission_limit: int, prefill_budget: int, cpu_attention: float) -> None:
    """New settings from the next pass on. Nothing moves: the share of CPU attention holds for those that come."""
    policy = scheduler.policy
    scheduler.admission_limit = max(1, min(admission_limit, policy.block_size))
    scheduler.prefill_budget = max(1, min(prefill_budget, policy.prompt_tokens_per_micro_batch))
    scheduler.block.set_cpu_attention(cpu_attention)
