"""What the budgets leave beside a block that is sized for likely answers: pages for answers that are longer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

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


def with_spare_pages(plan: EnginePlan, sizes: BlockSizes, job: Job) -> BlockSizes:
    """The sizes with as many pages more as the budgets hold, at most those of a block that reserves all; of staging
    first, which is a layer's part of them.

    A quantized cache on the gpu tier alone gets pages on the cpu tier, too: its pages have to move where a sequence
    steps aside.
    """
    full = plan.deployment.sizes(plan.policy, Job(job.cache_tokens, job.prompt_tokens)).cache
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
