"""Exact sizes of everything that a block needs beside the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexbatch.execution.job import Job
from flexbatch.memory.pages import CacheLayout, CacheSizes
from flexbatch.models.arch import Arch
from flexbatch.policy.limits import (
    CPU_ATTENTION_MAX_TREE_TOKENS,
    LOGITS_CHUNK_BYTES,
    MAX_MICRO_BATCH_TOKENS,
    MIN_LOGIT_ROWS,
    PAGE_TOKENS,
    cache_group,
)
from flexbatch.policy.policy import TIERS, Policy


def cache_layout(arch: Arch, bits: int, dtype: torch.dtype) -> CacheLayout:
    return CacheLayout(
        arch.num_layers, arch.num_kv_heads, arch.head_dim, bits, cache_group(arch.head_dim), PAGE_TOKENS, dtype
    )


def micro_batch_tokens(policy: Policy, max_query_nodes: int = 0) -> int:
    """Query tokens of one micro-batch, at most: every sequence's decode token with its tree, and one prompt chunk at
    least."""
    prompts = (
        policy.prompt_tokens_per_micro_batch
        if policy.prefill_budget
        else min(policy.prompt_tokens_per_micro_batch, MAX_MICRO_BATCH_TOKENS)
    )
    return policy.gpu_batch_size * (1 + max_query_nodes) + max(policy.chunk, prompts)


def logits_chunk_bytes(arch: Arch, policy: Policy, max_query_nodes: int = 0) -> int:
    """float32 logits that exist at one time: of all decode tokens of a micro-batch, as far as they fit the largest
    block."""
    rows = max(MIN_LOGIT_ROWS, policy.gpu_batch_size * (1 + max_query_nodes))
    return min(LOGITS_CHUNK_BYTES, 4 * arch.vocab_size * rows)


@dataclass(frozen=True)
class BlockSizes:
    """Exact sizes of everything that a block needs beside the weights."""

    cache: CacheSizes
    max_micro_batch_tokens: int
    max_cpu_attention_tokens: int
    max_query_nodes: int = 0
    """Nodes of the largest token tree."""
    sequence_tokens: tuple[int, ...] = ()
    """Token rows of the longest requests, one per sequence of the block."""
    longest: int = 1
    """Positions that a sequence may reach."""
    attended_sequences: int = 0
    """Sequences of a micro-batch whose cache the CPU attends, at most."""


def block_sizes(policy: Policy, layout: CacheLayout, job: Job, max_query_nodes: int = 0) -> BlockSizes:
    """Pages for a full block of the job's longest requests on every tier's share (a tier may hold one sequence more
    than its share)."""
    block = min(policy.block_size, max(1, job.num_requests))
    sequence_tokens = tuple(sorted(job.cache_tokens, reverse=True)[:block])
    longest = [layout.num_pages(tokens + max_query_nodes) for tokens in sequence_tokens] or [1]
    pages = {}
    for tier, fraction in zip(TIERS, policy.cache.fractions, strict=True):
        count = min(block, int(block * fraction + 1 - 1e-9) + (1 if 0 < fraction < 1 else 0)) if fraction > 0 else 0
        pages[tier] = sum(longest[:count])
    # Sequences of a micro-batch that go through staging: all that are not on the gpu tier (a CPU-attended one while its
    # prompt is read).
    per_micro_batch = min(policy.gpu_batch_size, block)
    off_gpu = (
        min(
            per_micro_batch,
            -(-int(block * (1 - policy.cache.gpu) + 2) // max(1, min(policy.num_gpu_batches, block))) + 1,
        )
        if policy.cache.gpu < 1
        else 0
    )
    on_disk = min(block, int(block * policy.cache.disk + 2)) if policy.cache.disk > 0 else 0
    cache = CacheSizes(
        gpu_pages=pages["gpu"],
        cpu_pages=pages["cpu"],
        disk_pages=pages["disk"],
        staging_pages=sum(longest[:off_gpu]),
        disk_sequences=on_disk,
        tail_tokens=2 * layout.page_tokens + max_query_nodes if on_disk else 0,
    )
    tokens = micro_batch_tokens(policy, max_query_nodes)
    cpu_attended = off_gpu if policy.cpu_attention > 0 else 0
    attended_tokens = cpu_attended * min(CPU_ATTENTION_MAX_TREE_TOKENS, max_query_nodes + 1)
    return BlockSizes(
        cache, tokens, attended_tokens, max_query_nodes, sequence_tokens, max(sequence_tokens, default=1), cpu_attended
    )
