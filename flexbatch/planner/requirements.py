"""Bytes by tier and purpose of a model, a policy and a block, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from flexbatch.execution.block_sizes import BlockSizes, logits_chunk_bytes
from flexbatch.execution.routed_rows import buffer_tokens
from flexbatch.kernels.latent_reference import latent_workspace_bytes
from flexbatch.kernels.native_sizes import workspace_bytes
from flexbatch.memory.files import align
from flexbatch.memory.pages import CacheLayout
from flexbatch.memory.rotary import table_bytes
from flexbatch.memory.tiers import MemoryRequirement
from flexbatch.memory.weight_plan import WeightPlan
from flexbatch.models.arch import Arch
from flexbatch.policy.admission import micro_batch_tokens
from flexbatch.policy.decode_graphs import MAX_GRAPHS, PLANNED_GRAPHS, graph_bytes, graph_pool_bytes, runs_graphs
from flexbatch.policy.footprint import logits_bytes
from flexbatch.policy.limits import (
    CPU_ATTENTION_MAX_TREE_TOKENS,
    INPUT_BUFFER_BYTES,
    NUM_EXPERT_BUFFERS,
    expert_buffer_bytes,
    expert_scratch_bytes,
)
from flexbatch.policy.piece_graphs import piece_buckets, piece_bytes
from flexbatch.policy.policy import Policy
from flexbatch.policy.units import size_text


def pass_workspace_bytes(arch: Arch, policy: Policy, dtype: torch.dtype, max_query_nodes: int = 0) -> int:
    """Intermediate results of one tick: hidden states, projections, MLP, and one chunk of logits with what sampling
    makes of them."""
    logits = logits_bytes(logits_chunk_bytes(arch, policy, max_query_nodes) // 4)
    return micro_batch_tokens(policy, max_query_nodes) * arch.workspace_elements * dtype.itemsize + int(logits)


def attention_workspace_bytes(arch: Arch, policy: Policy, sizes: BlockSizes, threads: int, device: str) -> int:
    """What compiled attention takes beside its tensors: of the CPU's share (``device`` "cpu"), or of everything on a
    machine without a GPU ("gpu")."""
    nodes, keys = sizes.max_query_nodes, sizes.longest + sizes.max_query_nodes
    sequences, tokens, queries = policy.gpu_batch_size, sizes.max_micro_batch_tokens, sizes.max_micro_batch_tokens
    if device == "cpu":
        sequences, tokens, queries = (
            sizes.attended_sequences,
            sizes.max_cpu_attention_tokens,
            min(CPU_ATTENTION_MAX_TREE_TOKENS, nodes + 1),
        )
    if arch.latent is not None:
        return 0 if device == "cpu" else latent_workspace_bytes(arch.num_heads, arch.head_dim, keys)
    return workspace_bytes(arch.num_heads, arch.num_kv_heads, arch.head_dim, sequences, tokens, queries, keys, threads)


def block_requirements(
    plan: WeightPlan,
    policy: Policy,
    layout: CacheLayout,
    sizes: BlockSizes,
    dtype: torch.dtype,
    cuda: bool,
    threads: int = 1,
) -> list[MemoryRequirement]:
    """Returns the bytes by purpose and tier: the table of `check_budgets` and of the report. threads: of attention on
    the CPU."""
    arch, cache = plan.arch, sizes.cache
    dequantized = plan.dequantization_bytes("pre") + plan.dequantization_bytes("post")
    disk_slab = max(plan.layer_bytes(layer, "disk") for layer in range(len(plan.layers)))
    activation = sizes.max_micro_batch_tokens * arch.hidden_size * dtype.itemsize * policy.num_gpu_batches
    # Rows go to their tier in pages: the last page of a micro-batch may be a part of one.
    host_rows = (sizes.max_micro_batch_tokens + layout.page_tokens) * arch.hidden_size * dtype.itemsize
    off_gpu = 1 - policy.activations.gpu
    head = (2 * arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim * dtype.itemsize
    rows = [
        MemoryRequirement("weights", "gpu", plan.tier_bytes("gpu")),
        MemoryRequirement("weights", "cpu", plan.tier_bytes("cpu")),
        MemoryRequirement("weights", "disk", plan.tier_bytes("disk")),
        MemoryRequirement(f"weight slabs ({plan.num_slabs})", "gpu", plan.num_slabs * plan.slab_bytes),
        MemoryRequirement("dequantization buffers", "gpu", dequantized),
        MemoryRequirement("cache", "gpu", layout.cache_bytes(cache, "gpu")),
        MemoryRequirement("cache", "cpu", layout.cache_bytes(cache, "cpu")),
        MemoryRequirement("cache", "disk", layout.cache_bytes(cache, "disk")),
        MemoryRequirement("cache staging (2)", "gpu", 2 * layout.staging_bytes(cache)),
        MemoryRequirement(
            "cache tails", "cpu", layout.num_layers * cache.disk_sequences * cache.tail_tokens * layout.token_bytes
        ),
        MemoryRequirement("activations", "gpu", activation if policy.activations.gpu > 0 else 0),
        MemoryRequirement("activations", "cpu", policy.num_gpu_batches * host_rows if off_gpu > 0 else 0),
        MemoryRequirement(
            "activations", "disk", policy.num_gpu_batches * align(host_rows) if policy.activations.disk > 0 else 0
        ),
        MemoryRequirement("rotary tables", "gpu", table_bytes(arch, sizes.longest, dtype)),
        MemoryRequirement("workspace", "gpu", pass_workspace_bytes(arch, policy, dtype, sizes.max_query_nodes)),
        MemoryRequirement(
            "attention workspace", "gpu", 0 if cuda else attention_workspace_bytes(arch, policy, sizes, threads, "gpu")
        ),
        MemoryRequirement("attention workspace", "cpu", attention_workspace_bytes(arch, policy, sizes, threads, "cpu")),
    ]
    rows += expert_requirements(plan, policy, sizes, dtype, cuda)
    if cuda:
        rows += [
            MemoryRequirement(
                "disk staging",
                "cpu",
                plan.num_slabs * disk_slab + (2 * layout.staging_bytes(cache) if cache.disk_pages else 0),
            ),
            MemoryRequirement("inputs", "cpu", 2 * INPUT_BUFFER_BYTES),
            MemoryRequirement("attention buffers (4)", "cpu", 4 * sizes.max_cpu_attention_tokens * head),
        ]
    return [row for row in rows if row.num_bytes]


def expert_requirements(
    plan: WeightPlan, policy: Policy, sizes: BlockSizes, dtype: torch.dtype, cuda: bool
) -> list[MemoryRequirement]:
    """What the CPU's experts take: routed rows on their way, scratch, and copies of biases that lie elsewhere."""
    arch, experts = plan.arch, plan.arch.experts
    if experts is None or not policy.cpu_experts:
        return []
    hidden, top_k = arch.hidden_size, experts.top_k
    tokens = buffer_tokens(experts, policy, sizes.max_query_nodes)
    buffers = NUM_EXPERT_BUFFERS if cuda else 0
    rows = buffers * expert_buffer_bytes(tokens, hidden, top_k, dtype.itemsize)
    biases = sum(
        tensor.num_bytes
        for layer in plan.layers
        for tensor in layer
        if tensor.spec.role.startswith("expert_biases.") and tensor.tier != "cpu"
    )
    return [
        MemoryRequirement(f"expert buffers ({NUM_EXPERT_BUFFERS})", "cpu", rows),
        MemoryRequirement("expert workspace", "cpu", tokens * expert_scratch_bytes(hidden, top_k, experts.width)),
        MemoryRequirement("expert biases", "cpu", biases),
    ]


def one_graph_bytes(arch: Arch, policy: Policy, layout: CacheLayout, sizes: BlockSizes) -> int:
    return graph_bytes(
        arch.num_layers,
        arch.hidden_size * layout.dtype.itemsize,
        policy.gpu_batch_size,
        sizes.longest,
        layout.page_tokens,
        arch.experts is not None,
        sizes.cache.windows.ring if sizes.cache.windows else 0,
    )


@dataclass(frozen=True)
class Graphs:
    """CUDA graphs that a block keeps: of decode passes, and the buckets of tokens of passes in pieces."""

    decode: int = 0
    buckets: tuple[int, ...] = ()
    num_bytes: int = 0
    missing_bytes: int = 0
    """Of GPU memory, for those that a plan counts on: passes without a graph are launched kernel by kernel."""

    def lack(self) -> str:
        """What runs without them, and a remedy; empty where nothing does."""
        if not self.missing_bytes:
            return ""
        those = f"passes of more than {self.buckets[-1]:,} tokens" if self.buckets else "passes with prompts"
        return (
            f"{those if self.decode else 'all passes'} are launched kernel by kernel: their CUDA graphs need "
            f"{size_text(self.missing_bytes)} more of GPU memory than the block leaves. Raise --gpu-memory or lower "
            f"--gpu-batch-size"
        )


def graphs_that_fit(
    arch: Arch,
    policy: Policy,
    layout: CacheLayout,
    sizes: BlockSizes,
    rows: Iterable[MemoryRequirement],
    budget: int,
    cuda: bool,
) -> Graphs:
    """The graphs of a block: they save launches and are not worth refusing a job, so they take what its ``rows`` leave
    of the gpu tier's budget. First the decode graphs that a plan counts on, then pieces, the smallest passes first,
    then more decode graphs."""
    resident = all(split.gpu == 1 for split in (policy.weights, policy.cache, policy.activations))
    ranks, stages = 1 if arch.shard is None else arch.shard.ranks, 1 if arch.stage is None else 2
    if not (resident and runs_graphs(policy, "cuda" if cuda else "cpu", ranks, stages)):
        return Graphs()
    width, one = layout.dtype.itemsize, one_graph_bytes(arch, policy, layout, sizes)
    workspace, buckets = arch.workspace_elements * width, piece_buckets(policy, ranks)
    pool = graph_pool_bytes(policy.gpu_batch_size, workspace, arch.vocab_size, width)
    experts = arch.experts is not None
    left = budget - sum(row.num_bytes for row in rows if row.tier == "gpu") - pool
    decode = max(0, min(PLANNED_GRAPHS, left // one))

    def pieces(count: int) -> int:
        return piece_bytes(arch.num_layers, buckets[:count], workspace, experts)

    spare = left - decode * one if decode == PLANNED_GRAPHS else 0
    count = next(count for count in range(len(buckets), -1, -1) if pieces(count) <= spare)
    decode = max(0, min(MAX_GRAPHS, (left - pieces(count)) // one))
    missing = max(0, PLANNED_GRAPHS * one + pieces(len(buckets)) - left)
    if not decode:
        return Graphs(missing_bytes=missing)
    return Graphs(decode, buckets[:count], pool + decode * one + pieces(count), missing)


def graph_requirements(graphs: Graphs) -> list[MemoryRequirement]:
    """The row of the graphs, where there are any."""
    pieces = f", {len(graphs.buckets)} in pieces" if graphs.buckets else ""
    row = MemoryRequirement(f"decode graphs ({graphs.decode}{pieces})", "gpu", graphs.num_bytes)
    return [row] if graphs.decode else []
