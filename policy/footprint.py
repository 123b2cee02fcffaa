"""Peak memory of a policy per kind and tier: affine in the splits for the linear program, and exact after rounding
to tensors and sequences."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from flexbatch.policy.admission import most_prompt_tokens, off_gpu_sequences, sequences_on
from flexbatch.policy.affine import RESIDENT, affine, evaluate, point_of
from flexbatch.policy.balancer import dealt
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.layer_window import passing_pages
from flexbatch.policy.limits import (
    DISK_ALIGNMENT,
    INPUT_BUFFER_BYTES,
    LOGITS_CHUNK_BYTES,
    MIN_LOGIT_ROWS,
    NUM_EXPERT_BUFFERS,
    PAGE_TOKENS,
    SAMPLING_BYTES_PER_LOGIT,
    SAMPLING_CHUNK_LOGITS,
    cpu_expert_tokens,
    expert_buffer_bytes,
    expert_scratch_bytes,
)
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import reserved_tokens
from flexbatch.policy.piece_graphs import planned_bytes
from flexbatch.policy.policy import TIERS, Policy, Split
from flexbatch.policy.workload import Workload

KIND_LABELS = (
    "weights",
    "weight slabs",
    "cache",
    "cache staging",
    "activations",
    "workspace",
    "logits",
    "decode graphs",
    "reserved",
)

STAGED = "activations_cpu", "activations_disk"


def prompt_tokens_per_pass(workload: Workload, policy: Policy) -> float:
    """Prompt tokens of one micro-batch in one pass at the peak: its budget, or all its sequences' chunks."""
    longest = workload.longest_prompt
    return min(policy.prompt_tokens_per_micro_batch, policy.gpu_batch_size * math.ceil(longest))


def logits_bytes(num_logits: float) -> float:
    """A block of float32 logits, and the copies that random sampling or log-probabilities make of a part of it at a
    time."""
    block = min(LOGITS_CHUNK_BYTES, 4.0 * num_logits)
    return block + SAMPLING_BYTES_PER_LOGIT * min(SAMPLING_CHUNK_LOGITS, block / 4)


def memory_rows(
    shape: ModelShape, hardware: Hardware, workload: Workload, policy: Policy
) -> dict[str, dict[str, np.ndarray]]:
    """``rows[tier][kind]``: peak bytes as an affine function of the placement (see `cost.affine`), for the policy's
    sizes and bits.

    Buffers that the executor keeps: the working slabs of the largest layer's non-resident weights, one 16-bit
    dequantization buffer for quantized weights, two staging areas of the largest micro-batch's non-resident cache of
    one layer (prompts of sequences that the CPU attends pass through them too), two staged micro-batches of hidden
    states.
    """
    batch, batches, bits = policy.gpu_batch_size, policy.num_gpu_batches, policy.weight_bits
    row, weights = shape.token_bytes(policy.cache_bits), shape.total_bytes(bits)
    slab = float(policy.num_weight_slabs) * shape.streamed_layer_bytes(bits)
    dequantization = shape.dequantized_bytes(bits)
    kept = kept_tokens(shape, workload, policy)
    cache = (shape.stages * batch * batches * kept + passing_tokens(shape, workload, policy)) * row
    staged = 2.0 * staged_tokens(shape, workload, policy) * row
    # On its way from disk to the link everything stops over in host memory; without a GPU it is read straight into
    # place.
    stopover = 1.0 if hardware.device == "cuda" else 0.0
    tokens = batch + prompt_tokens_per_pass(workload, policy)
    hidden, two_hidden = batches * tokens * shape.hidden_bytes, 2.0 * tokens * shape.hidden_bytes
    between, away = (hidden + two_hidden) * (shape.stages > 1), dict.fromkeys(STAGED, two_hidden)
    exchange = attention_exchange_bytes(shape, policy) + expert_exchange_bytes(shape, policy)
    tails = 2 * shape.stages * batch * batches * PAGE_TOKENS * row * shape.num_layers
    gpu = {
        "weights": affine(weights_gpu=weights),
        "weight slabs": affine(dequantization, weights_cpu=slab, weights_disk=slab),
        "cache": affine(cache_gpu=cache),
        "cache staging": affine(cache_cpu=staged, cache_disk=staged),
        "activations": affine(between, activations_gpu=hidden, **away),
        "workspace": affine(tokens * shape.peak_workspace_bytes),
        "logits": affine(logits_bytes(max(MIN_LOGIT_ROWS, batch) * shape.vocab_size)),
        # Only where everything is on the gpu tier; the cache is the last that gets there.
        "decode graphs": affine(cache_gpu=graph_bytes_of(shape, hardware, workload, policy)),
        "reserved": affine(hardware.gpu_reserved_bytes),
    }
    cpu = {
        "weights": affine(weights_cpu=weights),
        "weight slabs": affine(weights_disk=stopover * slab),
        "cache": affine(cache_cpu=cache, cache_disk=tails),
        # However few sequences are on the disk, a micro-batch may hold all of them.
        "cache staging": affine(cache_cpu=stopover * staged, cache_disk=stopover * staged)
        if policy.cache.disk
        else affine(),
        "activations": affine(activations_cpu=hidden, activations_disk=two_hidden),
        # Inputs on their way up; four buffers of queries, keys, values and results of CPU attention; routed rows.
        "workspace": affine(stopover * (2 * INPUT_BUFFER_BYTES + exchange)),
        "reserved": affine(hardware.cpu_reserved_bytes),
    }
    disk = {
        "weights": affine(weights_disk=weights),
        "cache": affine(cache_disk=padded(row) * cache),
        "activations": affine(activations_disk=hidden),
    }
    return {"gpu": gpu, "cpu": cpu, "disk": disk}


def padded(row_bytes: int) -> float:
    """Times as many bytes as a page of so large rows takes on the disk, where it begins at an aligned offset."""
    page = PAGE_TOKENS * row_bytes
    return math.ceil(page / DISK_ALIGNMENT) * DISK_ALIGNMENT / page


def kept_tokens(shape: ModelShape, workload: Workload, policy: Policy) -> float:
    """Token rows, over all layers, that are reserved for the average sequence of the block."""
    return shape.kept_layers(reserved_tokens(workload, policy), window_tokens(shape))


def window_tokens(shape: ModelShape) -> float:
    """Token rows that a sequence keeps in a layer with a window, between passes."""
    window = shape.layer_window
    return PAGE_TOKENS * window.pages(1, PAGE_TOKENS) if window else math.inf


def passing_tokens(shape: ModelShape, workload: Workload, policy: Policy, share: float = 1.0) -> float:
    """Token rows of all layers with a window for a pass's chunks of prompts, which are kept until it is over; of a tier
    that has a share of the block, as all of them may be there."""
    if not shape.window_layers:
        return 0.0
    reserved = reserved_tokens(workload, policy)
    pages = policy.num_gpu_batches * passing_pages(policy, most_prompt_tokens(policy), PAGE_TOKENS)
    beyond = share * policy.block_size * max(0.0, reserved - window_tokens(shape))
    return shape.stages * shape.window_layers * min(PAGE_TOKENS * pages, beyond)


def staged_tokens(shape: ModelShape, workload: Workload, policy: Policy) -> float:
    """Token rows of a micro-batch in one layer: where every layer has a window, no more than a pass needs."""
    whole = policy.gpu_batch_size * reserved_tokens(workload, policy)
    if shape.window_layers < shape.num_layers:
        return whole
    passing = PAGE_TOKENS * passing_pages(policy, most_prompt_tokens(policy), PAGE_TOKENS)
    return min(whole, policy.gpu_batch_size * window_tokens(shape) + passing)


def attention_exchange_bytes(shape: ModelShape, policy: Policy) -> float:
    """Queries, keys, values and results of CPU attention, in four buffers."""
    tokens = policy.gpu_batch_size if policy.cpu_attention > 0 else 0
    return 8.0 * tokens * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * shape.element_bytes


def expert_exchange_bytes(shape: ModelShape, policy: Policy) -> float:
    """Routed rows on their way to the CPU's experts and back, and what these make of them on the way."""
    experts = shape.experts
    if experts is None or not policy.cpu_experts:
        return 0.0
    hidden, top_k = shape.hidden_size, experts.top_k
    most = cpu_expert_tokens(experts.count, top_k, policy.gpu_batch_size)
    buffers = NUM_EXPERT_BUFFERS * expert_buffer_bytes(most, hidden, top_k, shape.element_bytes)
    return buffers + most * expert_scratch_bytes(hidden, top_k, experts.width)


def graph_bytes_of(shape: ModelShape, hardware: Hardware, workload: Workload, policy: Policy) -> int:
    """The bytes of the decode graphs that a block on the gpu tier is planned with."""
    return planned_bytes(shape, policy, hardware, workload.longest_slots[0])


def has_graphs(peak: dict[str, dict[str, int]]) -> bool:
    """Whether a block with this peak memory runs its decode passes as graphs."""
    return peak["gpu"].get("decode graphs", 0) > 0


def spread_weights(shape: ModelShape, weights: Split, bits: int = 16) -> tuple[Split, float, float]:
    """The split that whole tensors can meet, and the largest parts of a layer as stored at ``bits`` that are not on the
    gpu tier, and on the disk, in bytes.

    See `balancer.dealt`: each tensor goes to the tier that is furthest behind its share.
    """
    embedding, head = (
        [shape.weight_bytes(elements, 16) for elements in tensors]
        for tensors in (shape.embedding_tensors, shape.head_tensors)
    )
    block, dense = shape.block_tensor_bytes(bits), shape.dense_tensor_bytes(bits)
    layers = [dense] * shape.dense_layers + [block] * (shape.num_layers - shape.dense_layers)
    tiers = iter(dealt(head, embedding, [size for tensors in layers for size in tensors], weights))
    placed, away, on_disk = [0] * len(TIERS), 0, 0
    for tensors in (head, embedding, *layers):
        there = [0] * len(TIERS)
        for size in tensors:
            there[next(tiers)] += size
        placed = [total + size for total, size in zip(placed, there, strict=True)]
        # Rows of the embedding are gathered where they lie.
        if tensors is not embedding:
            away, on_disk = max(away, sum(there[1:])), max(on_disk, there[2])
    return Split(*(size / sum(placed) for size in placed)), float(away), float(on_disk)


def round_cache(policy: Policy) -> Split:
    """Whole sequences on each tier: GPU and CPU rounded down first, what is left goes to the slowest tier that is
    asked for."""
    block = policy.block_size
    gpu = math.floor(block * policy.cache.gpu + 1e-6)
    cpu = math.floor(block * policy.cache.cpu + 1e-6)
    rest = block - gpu - cpu
    if policy.cache.disk * block <= 1e-6:
        if policy.cache.cpu > 0:
            cpu, rest = cpu + rest, 0
        else:
            gpu, rest = gpu + rest, 0
    return Split(gpu / block, cpu / block, rest / block)


def peak_memory(
    shape: ModelShape, hardware: Hardware, workload: Workload, policy: Policy, with_graphs: bool = False
) -> dict[str, dict[str, int]]:
    """``peak[tier][kind]`` in bytes at the placement that whole tensors and whole sequences can meet.

    with_graphs: a block on the gpu tier has its decode graphs, whether these fit or not. Without, they get what is
    left, or are not there: they are no reason to refuse a job.
    """
    rows = memory_rows(shape, hardware, workload, policy)
    split, away, on_disk = spread_weights(shape, policy.weights, policy.weight_bits)
    point = point_of(policy)
    point[1:4] = split.fractions
    peak = {tier: {kind: math.ceil(float(evaluate(row, point))) for kind, row in rows[tier].items()} for tier in TIERS}
    dequantization = shape.dequantized_bytes(policy.weight_bits)
    peak["gpu"]["weight slabs"] = dequantization + policy.num_weight_slabs * int(away)
    if peak["cpu"]["weight slabs"]:
        peak["cpu"]["weight slabs"] = policy.num_weight_slabs * int(on_disk)
    # A micro-batch may hold one sequence more of a tier than its even share, and the longest ones.
    row, staged = shape.token_bytes(policy.cache_bits), off_gpu_sequences(policy, policy.block_size)
    longest = dataclasses.replace(policy, gpu_batch_size=max(1, staged), num_gpu_batches=1)
    staged_rows = staged_tokens(shape, workload, longest) / longest.gpu_batch_size
    peak["gpu"]["cache staging"] = math.ceil(2 * row * staged * staged_rows)
    passing, average = passing_tokens(shape, workload, policy), kept_tokens(shape, workload, policy)
    for tier, count in sequences_on(policy.cache, policy.block_size).items():
        share = policy.cache.fractions[TIERS.index(tier)]
        if 0 < share < 1:
            # Each tier is made for one sequence more than its share, and for the longest ones.
            longest = dataclasses.replace(policy, gpu_batch_size=count, num_gpu_batches=1)
            more = shape.stages * (count * kept_tokens(shape, workload, longest) - share * policy.block_size * average)
            more += max(0.0, passing_tokens(shape, workload, policy, share) - share * passing)
            peak[tier]["cache"] += math.ceil(row * max(0.0, more) * (padded(row) if tier == "disk" else 1.0))
    resident = all(each.gpu >= 1 - RESIDENT for each in (policy.weights, policy.cache, policy.activations))
    graphs = graph_bytes_of(shape, hardware, workload, policy) if resident else 0
    peak["gpu"]["decode graphs"] = 0
    if with_graphs or sum(peak["gpu"].values()) + graphs <= hardware.gpu_memory_bytes:
        peak["gpu"]["decode graphs"] = graphs
    return peak


def capacity(hardware: Hardware) -> dict[str, int]:
    """Bytes of each tier."""
    return {"gpu": hardware.gpu_memory_bytes, "cpu": hardware.cpu_memory_bytes, "disk": hardware.disk_bytes}


def shortfall(peak: dict[str, dict[str, int]], hardware: Hardware) -> dict[str, int]:
    """Bytes by which each tier is too small; empty when all fits."""
    budgets = capacity(hardware)
    return {
        tier: sum(kinds.values()) - budgets[tier] for tier, kinds in peak.items() if sum(kinds.values()) > budgets[tier]
    }
