"""Peak memory of a policy per kind and tier: affine in the splits for the linear program, and exact after rounding
to tensors and sequences."""

from __future__ import annotations

import math

import numpy as np

from flexbatch.policy.affine import RESIDENT, affine, evaluate, point_of
from flexbatch.policy.decode_graphs import planned_bytes
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.limits import (
    INPUT_BUFFER_BYTES,
    LOGITS_CHUNK_BYTES,
    MIN_LOGIT_ROWS,
    PAGE_TOKENS,
    SAMPLING_BYTES_PER_LOGIT,
    SAMPLING_CHUNK_LOGITS,
)
from flexbatch.policy.model_shape import ModelShape
from flexbatch.policy.pass_load import reserved_tokens
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
    reserved, row = reserved_tokens(workload, policy), shape.token_bytes(policy.cache_bits)
    weights = shape.total_bytes(bits)
    slab = float(policy.num_weight_slabs) * shape.largest_layer_bytes(bits)
    dequantization = shape.dequantized_bytes(bits)
    cache = shape.stages * batch * batches * reserved * row * shape.num_layers
    staged = 2.0 * batch * reserved * row
    # On its way from disk to the link everything stops over in host memory; without a GPU it is read straight into
    # place.
    stopover = 1.0 if hardware.device == "cuda" else 0.0
    tokens = batch + prompt_tokens_per_pass(workload, policy)
    hidden, two_hidden = batches * tokens * shape.hidden_bytes, 2.0 * tokens * shape.hidden_bytes
    between, away = (hidden + two_hidden) * (shape.stages > 1), dict.fromkeys(STAGED, two_hidden)
    cpu_attention_tokens = batch if policy.cpu_attention > 0 else 0
    exchange = (
        8.0 * cpu_attention_tokens * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * shape.element_bytes
    )
    open_pages = shape.stages * batch * batches * PAGE_TOKENS * row * shape.num_layers
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
        "cache": affine(cache_cpu=cache, cache_disk=open_pages),
        # However few sequences are on the disk, a micro-batch may hold all of them.
        "cache staging": affine(cache_cpu=stopover * staged, cache_disk=stopover * staged)
        if policy.cache.disk
        else affine(),
        "activations": affine(activations_cpu=hidden, activations_disk=two_hidden),
        # Inputs on their way up; four buffers of queries, keys, values and results of CPU attention.
        "workspace": affine(stopover * (2 * INPUT_BUFFER_BYTES + exchange)),
        "reserved": affine(hardware.cpu_reserved_bytes),
    }
    disk = {
        "weights": affine(weights_disk=weights),
        "cache": affine(cache_disk=cache),
        "activations": affine(activations_disk=hidden),
    }
    return {"gpu": gpu, "cpu": cpu, "disk": disk}


def graph_bytes_of(shape: ModelShape, hardware: Hardware, workload: Workload, policy: Policy) -> int:
    """The bytes of the decode graphs that a block on the gpu tier is planned with."""
    return planned_bytes(shape, policy, hardware.device, workload.longest_slots[0])


def has_graphs(peak: dict[str, dict[str, int]]) -> bool:
    """Whether a block with this peak memory runs its decode passes as graphs."""
    return peak["gpu"].get("decode graphs", 0) > 0


def spread_weights(shape: ModelShape, weights: Split, bits: int = 16) -> tuple[Split, float]:
    """The split that whole tensors can meet, and the largest non-resident part of a layer as stored at ``bits``, in
    bytes.

    Tensors are dealt to the tiers by error diffusion over the whole model: each goes to the tier that is furthest
    behind its share.
    """
    asked = weights.fractions
    embedding, head = (
        [shape.weight_bytes(elements, 16) for elements in tensors]
        for tensors in (shape.embedding_tensors, shape.head_tensors)
    )
    block = shape.block_tensor_bytes(bits)
    dense = shape.dense_tensor_bytes(bits)
    layers = [embedding, *[dense] * shape.dense_layers, *[block] * (shape.num_layers - shape.dense_layers), head]
    placed, total, largest = [0.0] * len(TIERS), 0.0, 0.0
    tiers = [tier for tier, share in enumerate(asked) if share > 0]
    for index, tensors in enumerate(layers):
        away = 0.0
        for num_bytes in tensors:
            total += num_bytes
            tier = max(tiers, key=lambda tier: asked[tier] * total - placed[tier])
            placed[tier] += num_bytes
            away += num_bytes * (tier != 0)
        largest = max(largest, away if index else 0.0)
    return Split(*(num_bytes / total for num_bytes in placed)), largest


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
    split, away = spread_weights(shape, policy.weights, policy.weight_bits)
    point = point_of(policy)
    point[1:4] = split.fractions
    peak = {tier: {kind: math.ceil(float(evaluate(row, point))) for kind, row in rows[tier].items()} for tier in TIERS}
    dequantization = shape.dequantized_bytes(policy.weight_bits)
    peak["gpu"]["weight slabs"] = dequantization + policy.num_weight_slabs * int(away)
    # A micro-batch may hold one sequence more of a tier than its even share.
    staged_rows = shape.token_bytes(policy.cache_bits) * reserved_tokens(workload, policy)
    per_batch = policy.gpu_batch_size * (policy.cache.cpu + policy.cache.disk)
    peak["gpu"]["cache staging"] += math.ceil(2 * staged_rows * (math.ceil(per_batch - 1e-6) - per_batch))
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
