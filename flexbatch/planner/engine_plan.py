"""What was decided for a job: policy, placement of the weights, and what follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexbatch.config import EngineConfig
from flexbatch.execution.block_sizes import BlockSizes, block_sizes, cache_layout, logits_chunk_bytes
from flexbatch.execution.job import Job
from flexbatch.memory.pages import CacheLayout
from flexbatch.memory.tiers import MemoryRequirement
from flexbatch.memory.weight_plan import WeightPlan, plan_weights
from flexbatch.models.arch import Arch
from flexbatch.models.lora.adapter_set import AdapterSet
from flexbatch.models.opened import OpenModel
from flexbatch.models.shard import RankShard
from flexbatch.models.sharding import shard_of
from flexbatch.parallel.channel import RankChannel
from flexbatch.parallel.links import ONE_ENGINE, EngineGroup
from flexbatch.planner import budgets, requirements
from flexbatch.policy.limits import weight_group
from flexbatch.policy.plan import Plan
from flexbatch.policy.policy import Policy
from flexbatch.speculative.setup import Speculation


@dataclass(frozen=True)
class Deployment:
    """What does not change from job to job: the model, where it computes, and the bytes of each tier."""

    config: EngineConfig
    model: OpenModel
    device: torch.device
    dtype: torch.dtype
    budgets: dict[str, int]
    speculation: Speculation | None
    adapters: AdapterSet
    shards: tuple[RankShard, ...] = ()
    """Of all ranks; none where one process has the whole model."""
    rank: int = 0
    channel: RankChannel | None = None
    """To ranks that somebody else has started; None: where there are some, they are started with the engine."""
    group: EngineGroup = ONE_ENGINE
    """The engines that share the line of requests with this one."""

    @property
    def shard(self) -> RankShard | None:
        """What this rank has of the model. Budgets, too, are those of one rank."""
        return self.shards[self.rank] if self.shards else None

    @property
    def local_ranks(self) -> int:
        """Ranks on this host, of all engines, which share what is not their GPUs'."""
        own = max(1, len(self.shards)) if self.channel is None else self.channel.mesh.local_size
        return own * self.group.local_engines

    @cached_property
    def arch(self) -> Arch:
        """Of what this rank has."""
        return self.model.arch if self.shard is None else shard_of(self.model.arch, self.shard)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def offload_dir(self) -> Path:
        """Where the disk tier lies, and the disk that is measured."""
        return budgets.offload_dir(self.config)

    def layout(self, policy: Policy) -> CacheLayout:
        return cache_layout(self.arch, policy.cache_bits, self.dtype)

    def weight_plan(self, policy: Policy, num_slabs: int | None = None) -> WeightPlan:
        """Every tensor's tier. num_slabs: working slabs of loaded weights, which stay."""
        arch, prequantized = self.arch, self.model.prequantized
        bits = self.config.weight_bits if prequantized else policy.weight_bits
        slabs = num_slabs or policy.num_weight_slabs
        group = weight_group(arch.hidden_size)
        size, adapters = self.dtype.itemsize, self.adapters.specs
        return plan_weights(arch, policy.weights, bits, group, size, prequantized, slabs, adapters)

    def sizes(self, policy: Policy, job: Job) -> BlockSizes:
        """Returns the sizes of a block for a job."""
        return block_sizes(policy, self.layout(policy), job, self.speculation.max_nodes if self.speculation else 0)

    def requirements(self, weight_plan: WeightPlan, policy: Policy, sizes: BlockSizes) -> list[MemoryRequirement]:
        """Bytes by tier and purpose of the weights, a block of these sizes and the drafts."""
        threads = torch.get_num_threads()
        rows = requirements.block_requirements(
            weight_plan, policy, self.layout(policy), sizes, self.dtype, self.is_cuda, threads
        )
        if self.shard is not None:
            logits = logits_chunk_bytes(self.arch, policy, sizes.max_query_nodes)
            rows.append(MemoryRequirement("logits of the ranks", "gpu", 2 * logits))
        if self.adapters.adapters:
            needed = self.adapters.workspace_bytes(sizes.max_micro_batch_tokens, self.dtype.itemsize)
            rows.append(MemoryRequirement("adapter updates", "gpu", needed))
        return rows + (self.speculation.requirements(sizes.sequence_tokens, self.is_cuda) if self.speculation else [])


@dataclass(frozen=True)
class EnginePlan:
    """The decisions for a job. ``plan`` is None where nothing was priced."""

    deployment: Deployment
    policy: Policy
    plan: Plan | None
    weight_plan: WeightPlan
    answer_share: float = 1.0
    """Share of the length that answers are expected to have, ``max_tokens`` at first, that the block's pages suffice
    for: less than 1 where the user fixed a block that holds no more in the budgets."""

    def on(self, deployment: Deployment) -> EnginePlan:
        """The same decisions for other adapters."""
        weight_plan = deployment.weight_plan(self.policy, self.weight_plan.num_slabs)
        return replace(self, deployment=deployment, weight_plan=weight_plan)

    @property
    def config(self) -> EngineConfig:
        return self.deployment.config

    @property
    def model(self) -> OpenModel:
        return self.deployment.model

    @property
    def arch(self) -> Arch:
        """See `Deployment.arch`."""
        return self.deployment.arch

    @property
    def device(self) -> torch.device:
        return self.deployment.device

    @property
    def dtype(self) -> torch.dtype:
        return self.deployment.dtype

    @property
    def budgets(self) -> dict[str, int]:
        return self.deployment.budgets

    @property
    def speculation(self) -> Speculation | None:
        return self.deployment.speculation

    @property
    def layout(self) -> CacheLayout:
        return self.deployment.layout(self.policy)

    @property
    def offload_dir(self) -> Path:
        """See `Deployment.offload_dir`."""
        return self.deployment.offload_dir

    def sizes(self, job: Job) -> BlockSizes:
        """Returns the sizes of a block for a job."""
        return self.deployment.sizes(self.policy, job.assuming(self.answer_share))

    def requirements(self, sizes: BlockSizes) -> list[MemoryRequirement]:
        """Bytes by tier and purpose of the loaded weights and a block of these sizes."""
        rows = self.deployment.requirements(self.weight_plan, self.policy, sizes)
        return rows + requirements.graph_requirements(*self._graph_terms(sizes, rows))

    def num_graphs(self, sizes: BlockSizes) -> int:
        """CUDA graphs that are kept beside a block of these sizes."""
        rows = self.deployment.requirements(self.weight_plan, self.policy, sizes)
        return requirements.num_graphs(*self._graph_terms(sizes, rows))

    def _graph_terms(self, sizes: BlockSizes, rows: list[MemoryRequirement]) -> tuple[Any, ...]:
        return self.arch, self.policy, self.layout, sizes, rows, self.budgets["gpu"], self.deployment.is_cuda

    def describe(self) -> dict[str, Any]:
        """Model, machine and policy: the beginning of every report."""
        return {
            "model": self.config.model,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "policy": asdict(self.policy),
            "percent": list(self.policy.percent),
            "budgets": self.budgets,
        }


def described(policy: Policy) -> str:
    percent = " ".join(f"{share:.4g}" for share in policy.percent)
    return (
        f"--percent {percent}, {policy.num_gpu_batches} micro-batches of {policy.gpu_batch_size}, "
        f"{policy.cpu_attention:.0%} CPU attention"
        + (f", {policy.cpu_experts:.0%} CPU experts" if policy.cpu_experts else "")
    )
