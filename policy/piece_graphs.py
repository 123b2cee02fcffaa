"""Memory of passes that run in pieces, a CUDA graph between every two attentions, counted by the engine and the planner
alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexbatch.policy.admission import micro_batch_tokens
from flexbatch.policy.decode_graphs import (
    LAUNCH_BYTES,
    LAUNCHES_OF_EXPERTS,
    LAUNCHES_OF_LAYER,
    PLANNED_GRAPHS,
    graph_bytes,
    graph_pool_bytes,
    runs_graphs,
)
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import MAX_PIECE_TOKENS, PAGE_TOKENS
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.policy import Policy

BUCKETS = (32, 64, *range(128, 2048, 128), *range(2048, 4096, 256), *range(4096, MAX_PIECE_TOKENS + 1, 512))
"""Tokens that pieces are recorded for. Small passes wait for the host, so that coarse steps cost nothing; large ones
compute what fills a bucket up along, 1/16 of them on average from 1,024 tokens on and less of larger ones."""

PIECED_RANKS = 1
"""Ranks that share every layer and run passes in pieces, sums between them recorded, at most. One: GPUs have recorded
the sums of decode passes, and no pieces of several ranks yet, which ``tests/parallel/test_cuda.py`` does."""


def piece_buckets(policy: Policy, tensor_ranks: int = 1) -> tuple[int, ...]:
    """Tokens of the passes that a block runs in pieces, the least first: up to those of its largest pass, or what the
    policy says."""
    most = min(policy.piece_tokens, micro_batch_tokens(policy)) if tensor_ranks <= PIECED_RANKS else 0
    return BUCKETS[: sum(bucket < most for bucket in BUCKETS) + 1] if most else ()


def tokens_of(buckets: Sequence[int], tokens: np.ndarray) -> np.ndarray:
    """Tokens that passes of so many compute in pieces: those of their bucket. More than the largest are no pieces."""
    padded = np.append(np.asarray(buckets, dtype=float), np.inf)[np.searchsorted(buckets, tokens)]
    return np.where(np.isfinite(padded), padded, tokens)


def piece_bytes(num_layers: int, buckets: Sequence[int], workspace_bytes: int, experts: bool) -> int:
    """Bytes of the pieces of all buckets: the driver's, what they give to attention and to the head, and intermediate
    results of the largest, which they share. workspace_bytes: of one token."""
    launches = (LAUNCHES_OF_LAYER + LAUNCHES_OF_EXPERTS * experts) * num_layers
    return len(buckets) * LAUNCH_BYTES * launches + 2 * max(buckets, default=0) * workspace_bytes


def planned_bytes(shape: ModelShape, policy: Policy, hardware: Hardware, longest: float) -> int:
    """The bytes of the graphs that a plan counts on, pieces among them. longest: tokens of the longest sequence."""
    if not runs_graphs(policy, hardware.device, hardware.tensor_ranks, shape.stages):
        return 0
    sizes, experts = (shape.num_layers, shape.hidden_bytes, policy.gpu_batch_size), shape.experts is not None
    one, workspace = graph_bytes(*sizes, int(longest), PAGE_TOKENS, experts), shape.peak_workspace_bytes
    pieces = piece_bytes(shape.num_layers, piece_buckets(policy, hardware.tensor_ranks), workspace, experts)
    pool = graph_pool_bytes(policy.gpu_batch_size, workspace, shape.vocab_size, shape.element_bytes)
    return PLANNED_GRAPHS * one + pieces + pool
