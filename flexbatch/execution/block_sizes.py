"""Exact sizes of everything that a block needs beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flexbatch.execution.job import Job
from flexbatch.memory.pages import CacheLayout
from flexbatch.models.arch import Arch
from flexbatch.policy.admission import CacheSizes, cache_sizes, micro_batch_tokens, off_gpu_sequences
from flexbatch.policy.layer_window import LayerWindow
from flexbatch.policy.limits import (
    CPU_ATTENTION_MAX_TREE_TOKENS,
    LOGITS_CHUNK_BYTES,
    MIN_LOGIT_ROWS,
    PAGE_TOKENS,
    RESERVED_DEVIATIONS,
    cache_group,
)
from flexbatch.policy.policy import Policy


def cache_layout(arch: Arch, bits: int, dtype: torch.dtype) -> CacheLayout:
    group = cache_group(arch.head_dim)
    sizes = arch.num_layers, arch.num_kv_heads, arch.head_dim
    windows = arch.window_layers
    window = LayerWindow(arch.sliding_window, arch.chunked_window) if any(windows) else None
    return CacheLayout(*sizes, bits, group, PAGE_TOKENS, dtype, arch.cache_sides, window, windows if window else ())


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


def block_sizes(
    policy: Policy, layout: CacheLayout, job: Job, max_query_nodes: int = 0, passes_in_flight: int = 1
) -> BlockSizes:
    """Pages for a full block of the job's longest requests, or of its likely ones where these are known, on every
    tier's share (a tier may hold one sequence more than its share). passes_in_flight: each has as many sequences as the
    policy says."""
    policy = replace(policy, num_gpu_batches=policy.num_gpu_batches * passes_in_flight)
    block = min(policy.block_size, max(1, job.num_requests))
    sequence_tokens = tuple(job.rows_to_reserve(block, RESERVED_DEVIATIONS))
    longest = [layout.num_pages(tokens + max_query_nodes) for tokens in sequence_tokens] or [1]
    cache = cache_sizes(policy, longest, layout.page_tokens, max_query_nodes, layout.window)
    tokens = micro_batch_tokens(policy, max_query_nodes)
    on_cpu = off_gpu_sequences(policy, block) if policy.cpu_attention > 0 else 0
    cpu_attention_tokens = on_cpu * min(CPU_ATTENTION_MAX_TREE_TOKENS, max_query_nodes + 1)
    return BlockSizes(
        cache, tokens, cpu_attention_tokens, max_query_nodes, sequence_tokens, max(sequence_tokens, default=1), on_cpu
    )
