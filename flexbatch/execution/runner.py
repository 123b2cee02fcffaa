"""The one wiring of cache, activations, buffers and executor: the engine, drafts and calibration run passes through it.

It lives as long as the jobs fit it; a job that needs more makes another one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexbatch.execution.block_sizes import BlockSizes
from flexbatch.execution.executor import Executor
from flexbatch.execution.pass_batch import Lead
from flexbatch.execution.routed_rows import RoutedRows, buffer_tokens
from flexbatch.execution.set_up import load_kernels
from flexbatch.memory.activations import ActivationStore
from flexbatch.memory.cache_orders import CacheOrders
from flexbatch.memory.host_buffers import HostBuffers
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.pages import CacheLayout
from flexbatch.memory.rotary import Rotary
from flexbatch.memory.tiers import Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.models.arch import Arch
from flexbatch.models.lora.adapter_set import AdapterSet
from flexbatch.models.lora.applied import AdapterTables
from flexbatch.models.routing import RoutingCounts
from flexbatch.parallel.rank_links import RankLinks
from flexbatch.policy.decode_graphs import MAX_GRAPHS
from flexbatch.policy.limits import LOGITS_CHUNK_BYTES
from flexbatch.policy.policy import Policy


@dataclass
class Runner:
    """What runs passes: executor, and the stores that hold a block's state, of one policy and one set of sizes."""

    policy: Policy
    sizes: BlockSizes
    cache: KVCache
    activations: ActivationStore
    host_buffers: HostBuffers
    rotary: Rotary
    executor: Executor
    routed: RoutedRows | None
    give_back: Callable[[], None]
    """Frees whatever it has in the tiers."""

    def holds(self, policy: Policy, sizes: BlockSizes) -> bool:
        """Whether a block of these sizes can run here."""
        return (
            self.policy == policy
            and self.sizes.cache.covers(sizes.cache)
            and self.sizes.max_cpu_attention_tokens >= sizes.max_cpu_attention_tokens
        )

    def reach(self, sizes: BlockSizes) -> None:
        """Take sequences as long as ``sizes`` says, otherwise the runner's own; the caller has checked the budgets."""
        self.executor.reach(sizes.longest)
        self.sizes = sizes

    def check(self) -> None:
        for part in self.parts:
            part.check()

    @property
    def parts(self) -> list[Any]:
        parts = self.rotary, self.host_buffers, self.activations, self.cache, self.routed, self.executor
        return [part for part in parts if part is not None]

    def close(self) -> None:
        """Also where one of its parts fails to close: the others are closed, and nothing stays in the tiers'
        accounts."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.give_back)
            for part in self.parts:
                stack.callback(part.close)


def open_runner(
    arch: Arch,
    weights: WeightStore,
    layout: CacheLayout,
    policy: Policy,
    sizes: BlockSizes,
    tiers: Tiers,
    queues: TransferQueues,
    logits_chunk_bytes: int = LOGITS_CHUNK_BYTES,
    max_graphs: int = MAX_GRAPHS,
    piece_buckets: Sequence[int] = (),
    adapters: AdapterSet | None = None,
    routing: RoutingCounts | None = None,
    links: RankLinks | None = None,
    lead: Lead | None = None,
) -> Runner:
    """A runner for blocks of these sizes; the caller has checked the budgets. routing: counts the tokens of experts,
    over this runner and those before it. piece_buckets, links, lead: as of an `Executor`.

    One that fails half-way (a disk that is full, a GPU without memory) leaves nothing behind.
    """
    load_kernels(queues.device, policy)
    dtype, width, page_tokens = layout.dtype, arch.hidden_size, layout.page_tokens
    batches, most_tokens = policy.num_gpu_batches, sizes.max_micro_batch_tokens
    with tiers.all_or_nothing() as give_back:
        cache = KVCache(layout, sizes.cache, tiers, queues, CacheOrders() if lead is not None else None)
        activations = ActivationStore(
            policy.activations, batches, most_tokens, width, dtype, page_tokens, tiers, queues
        )
        heads = arch.num_heads, arch.num_kv_heads, arch.head_dim
        host_buffers = HostBuffers(sizes.max_cpu_attention_tokens, *heads, dtype, tiers.cpu, queues)
        weights.leave_to_cpu(policy.cpu_experts)
        weights.few_in_codes = policy.few_in_codes
        routed = routed_rows(weights, policy, sizes, tiers, queues)
        rotary = Rotary(arch, sizes.longest, dtype, tiers.gpu)
        executor = Executor(
            arch,
            weights,
            cache,
            activations,
            queues,
            host_buffers,
            rotary,
            dtype,
            policy.overlap,
            logits_chunk_bytes,
            max_graphs,
            piece_buckets,
            AdapterTables(adapters, queues.device) if adapters is not None and adapters.adapters else None,
            routing,
            links,
            lead,
            routed,
        )
    keep_workspace(queues.device, most_tokens * arch.workspace_elements * dtype.itemsize)
    return Runner(policy, sizes, cache, activations, host_buffers, rotary, executor, routed, give_back)


def keep_workspace(device: torch.device, num_bytes: int) -> None:
    """Have torch's allocator keep one block of the size of the largest pass's workspace, from which passes cut theirs.
    Otherwise each pass that has a few tokens more than all before it gets larger blocks from the driver, while those
    that have become too small stay; when the GPU is full, all are given back, which waits for the device."""
    if device.type == "cuda":
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.empty(num_bytes, dtype=torch.uint8, device=device)


def routed_rows(
    weights: WeightStore, policy: Policy, sizes: BlockSizes, tiers: Tiers, queues: TransferQueues
) -> RoutedRows | None:
    """The way to the CPU's experts; None where it has none."""
    arch, experts = weights.plan.arch, weights.plan.arch.experts
    if experts is None or weights.cpu_experts is None:
        return None
    tokens = buffer_tokens(experts, policy, sizes.max_query_nodes)
    return RoutedRows(tokens, arch.hidden_size, experts.top_k, weights.dtype, tiers.cpu, queues)
