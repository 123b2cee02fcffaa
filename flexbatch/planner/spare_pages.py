"""What the budgets leave beside a block that is sized for likely answers: pages for answers that are longer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from statistics import pstdev

from flexbatch.execution.block_sizes import BlockSizes
from flexbatch.execution.job import Job
from flexbatch.memory.tiers import MemoryRequirement
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.policy.policy import TIERS


def left_of(plan: EnginePlan, rows: Iterable[MemoryRequirement]) -> dict[str, int]:
    """Bytes of each budget that the requirements leave."""
    left = dict(plan.budgets)
    for row in rows:
        left[row.tier] -= row.num_bytes
    return left


def of_chance(job: Job, block: int) -> Job:
    """The job with sequences so much longer as the mean of a block of them may be by chance: five standard deviations,
    since the job is a sample as well. One sequence that does not fit runs after all others, in as many passes as they
    took: 127 prompts of OPT-30B took two engines 35 s, of which 16 were for the last one."""
    more = math.ceil(5 * pstdev(job.cache_tokens) / math.sqrt(max(1, min(block, job.num_requests))))
    longest = max(job.cache_tokens, default=0)
    return Job(tuple(min(tokens + more, longest) for tokens in job.cache_tokens), job.prompt_tokens)


def with_spare_pages(plan: EnginePlan, sizes: BlockSizes, job: Job) -> BlockSizes:
    """The sizes with as many pages more as the budgets hold, at most those of a block that reserves all; of staging
    first, which is a layer's part of them. One of several engines, whose ``job`` is a sample of what it will get, has
    room for a share of longer sequences.

    A quantized cache on the gpu tier alone gets pages on the cpu tier, too: its pages have to move where a sequence
    steps aside.
    """
    all_reserved = Job(job.cache_tokens, job.prompt_tokens)
    if plan.config.data_parallel_size > 1:
        all_reserved = of_chance(all_reserved, plan.policy.block_size)
    full = plan.deployment.sizes(plan.made_for, all_reserved).cache
    layout, cache = plan.layout, sizes.cache
    if full == cache:
        return sizes
    layers = plan.deployment.most_layers.num_layers  # of a pipeline every stage gets the same pages
    page = {"gpu": layers * layout.page_bytes, "disk": layers * layout.disk_page_bytes}
    page["cpu"] = page["gpu"]
    left = left_of(plan, plan.requirements(sizes))
    staging = max(
        0, min(full.staging_pages - cache.staging_pages, min(left["gpu"], left["cpu"]) // (2 * layout.page_bytes))
    )
    cache = replace(cache, staging_pages=cache.staging_pages + staging)
    for tier in TIERS:
        left = left_of(plan, plan.requirements(replace(sizes, cache=cache)))
        more = max(0, min(full.pages(tier) - cache.pages(tier), left[tier] // page[tier]))
        windows = cache.windows and cache.windows.with_more(TIERS.index(tier), more, full.windows)
        cache = replace(cache, windows=windows, **{f"{tier}_pages": cache.pages(tier) + more})
    if layout.bits < 16 and plan.policy.cache.gpu == 1 and cache.gpu_pages < full.gpu_pages:
        left = left_of(plan, plan.requirements(replace(sizes, cache=cache)))
        # Of the longest sequence once for each tier: see `Block.is_safe`.
        missing = full.gpu_pages - cache.gpu_pages + 2 * layout.num_pages(sizes.longest + sizes.max_query_nodes)
        parking = min(missing, left["cpu"] // page["cpu"])
        windows = cache.windows and cache.windows.with_more(TIERS.index("cpu"), parking, None)
        cache = replace(cache, cpu_pages=parking, parking_pages=parking, windows=windows)
    return replace(sizes, cache=cache)
