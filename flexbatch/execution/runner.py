"""The block: everything that lives as long as the jobs fit it, and how it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

from flexbatch.execution.block_sizes import BlockSizes, logits_block_bytes
from flexbatch.execution.executor import Executor
from flexbatch.memory.activations import ActivationStore
from flexbatch.memory.host_buffers import HostBuffers
from flexbatch.memory.kvcache import KVCache
from flexbatch.memory.rotary import Rotary
from flexbatch.memory.tiers import Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.policy.policy import Policy


@dataclass
class Block:
    """Cache, activations, buffers and executor of one policy and one set of sizes."""

    policy: Policy
    sizes: BlockSizes
    cache: KVCache
    activations: ActivationStore
    host_buffers: HostBuffers
    rotary: Rotary
    executor: Executor
    give_back: Callable[[], None]
    """Frees whatever it has in the tiers."""

    def suits(self, policy: Policy, sizes: BlockSizes) -> bool:
        """Whether a job of these sizes can run in this block."""
        mine, wanted = asdict(self.sizes.cache), asdict(sizes.cache)
        return (
            self.policy == policy
            and all(mine[name] >= wanted[name] for name in wanted)
            and self.sizes.max_cpu_attention_tokens >= sizes.max_cpu_attention_tokens
        )

    def reach(self, sizes: BlockSizes) -> None:
        """Take sequences as long as ``sizes`` says, otherwise the block's own; the caller has checked the budgets."""
        self.executor.reach(sizes.longest)
        self.sizes = sizes

    def check(self) -> None:
        self.cache.check()
        self.activations.check()
        self.host_buffers.check()
        self.rotary.check()
        if self.executor.graphs is not None:
            self.executor.graphs.check()

    def close(self) -> None:
        """Also where one of its parts fails to close: the others are closed, and nothing stays in the tiers' accounts."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.give_back)
            for part in (self.rotary, self.host_buffers, self.activations, self.cache):
                stack.callback(part.close)
            if self.executor.graphs is not None:
                stack.callback(self.executor.graphs.clear)


def make_block(engine_plan: EnginePlan, sizes: BlockSizes, weights: WeightStore, tiers: Tiers, queues: TransferQueues) -> Block:
    """A block for the decided policy; the caller has checked the budgets. One that fails half-way (a disk that is full,
    a GPU without memory) leaves nothing behind.
    """
    with tiers.all_or_nothing() as give_back:
        return assemble(engine_plan, sizes, weights, tiers, queues, give_back)


def assemble(
    engine_plan: EnginePlan,
    sizes: BlockSizes,
    weights: WeightStore,
    tiers: Tiers,
    queues: TransferQueues,
    give_back: Callable[[], None],
) -> Block:
    policy, arch, dtype, layout = engine_plan.policy, engine_plan.arch, engine_plan.dtype, engine_plan.layout
    cache = KVCache(layout, sizes.cache, tiers, queues)
    activations = ActivationStore(
        policy.activations, policy.num_gpu_batches, sizes.max_micro_batch_tokens, arch.hidden_size, dtype, layout.page_tokens, tiers, queues
    )
    host_buffers = HostBuffers(sizes.max_cpu_attention_tokens, arch.num_heads, arch.num_kv_heads, arch.head_dim, dtype, tiers.cpu, queues)
    rotary = Rotary(arch, sizes.longest, dtype, tiers.gpu)
    logits_bytes = logits_block_bytes(arch, policy, sizes.max_query_nodes)
    executor = Executor(
        arch, weights, cache, activations, queues, host_buffers, rotary, dtype, engine_plan.config.overlap, logits_bytes,
        engine_plan.num_graphs(sizes),
    )  # fmt: skip
    return Block(policy, sizes, cache, activations, host_buffers, rotary, executor, give_back)
