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
from flexbatch.models.stage import RankStage, stage_of
from flexbatch.parallel.channel import RankChannel
from flexbatch.parallel.links import ONE_ENGINE, EngineGroup
from flexbatch.parallel.mesh import MeshShape
from flexbatch.planner import budgets, requirements
from flexbatch.planner.requirements import Graphs, graph_requirements, graphs_that_fit
from flexbatch.policy.admission import micro_batch_tokens
from flexbatch.policy.limits import weight_group
from flexbatch.policy.percent import percent_text
from flexbatch.policy.plan import Plan
from flexbatch.policy.policy import TIERS, Policy, Split
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
    """Of the ranks that share every layer; none where one has all of it."""
    stages: tuple[RankStage, ...] = ()
    """Of a pipeline; none where there is none."""
    rank: int = 0
    channel: RankChannel | None = None
    """To ranks that somebody else has started; None: where there are some, they are started with the engine."""
    group: EngineGroup = ONE_ENGINE
    """The engines that share the line of requests with this one."""

    @property
    def mesh(self) -> MeshShape:
        """Of the ranks that run this engine."""
        return MeshShape(pipeline=self.passes_in_flight, tensor=max(1, len(self.shards)))

    @property
    def passes_in_flight(self) -> int:
        """At most: one for each stage, every one of a block of its own."""
        return max(1, len(self.stages))

    @property
    def shard(self) -> RankShard | None:
        """What this rank has of every layer. Budgets, too, are those of one rank."""
        return self.shards[self.mesh.at(self.rank).tensor] if self.shards else None

    @property
    def stage(self) -> RankStage | None:
        """The layers of this rank."""
        return self.stages[self.mesh.at(self.rank).pipeline] if self.stages else None

    @property
    def local_ranks(self) -> int:
        """Ranks on this host, of all engines, which share what is not their GPUs'."""
        own = self.mesh.size if self.channel is None else self.channel.mesh.local_size
        return own * self.group.local_engines

    @cached_property
    def arch(self) -> Arch:
        """Of what this rank has."""
        arch = self.model.arch if self.shard is None else shard_of(self.model.arch, self.shard)
        return arch if self.stage is None else stage_of(arch, self.stage)

    @property
    def stage_arches(self) -> list[Arch]:
        """Of all stages, this rank's first."""
        return [self.arch, *(each.arch for each in self.other_stages)]

    @property
    def most_layers(self) -> Arch:
        """Of the stage that a policy is searched for."""
        return max(self.stage_arches, key=lambda arch: arch.num_layers)

    @cached_property
    def other_stages(self) -> tuple[Deployment, ...]:
        """As the first rank of every other stage has it."""
        mine = self.mesh.at(self.rank).pipeline
        firsts = range(0, self.mesh.size, self.mesh.tensor)
        return tuple(replace(self, rank=rank) for stage, rank in enumerate(firsts) if stage != mine)

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
        key = policy.weights, bits, slabs
        if key not in self._weight_plans:
            group, size, adapters = weight_group(arch.hidden_size), self.dtype.itemsize, self.adapters.specs
            self._weight_plans[key] = plan_weights(
                arch, policy.weights, bits, group, size, prequantized, slabs, adapters
            )
        return self._weight_plans[key]

    @cached_property
    def _weight_plans(self) -> dict[tuple[Split, int, int], WeightPlan]:
        """By what they depend on: a search asks for the same ones with many sizes of a block."""
        return {}

    def sizes(self, policy: Policy, job: Job) -> BlockSizes:
        """Returns the sizes of a block for a job."""
        nodes = self.speculation.max_nodes if self.speculation else 0
        return block_sizes(policy, self.layout(policy), job, nodes, self.passes_in_flight)

    def requirements(self, weight_plan: WeightPlan, policy: Policy, sizes: BlockSizes) -> list[MemoryRequirement]:
        """Bytes by tier and purpose of the weights, a block of these sizes and the drafts; in a pipeline, of each tier
        those of the stage that needs most of it."""
        own = self.own_requirements(weight_plan, policy, sizes)
        others = [
            each.own_requirements(each.weight_plan(policy, weight_plan.num_slabs), policy, sizes)
            for each in self.other_stages
        ]
        return largest_by_tier([own, *others]) if others else own

    def own_requirements(self, weight_plan: WeightPlan, policy: Policy, sizes: BlockSizes) -> list[MemoryRequirement]:
        """Of this rank."""
        threads = torch.get_num_threads()
        rows = requirements.block_requirements(
            weight_plan, policy, self.layout(policy), sizes, self.dtype, self.is_cuda, threads
        )
        if self.stage is not None:
            # All micro-batches of a pass may be on their way to the next stage, and two on theirs from the one before.
            hidden = sizes.max_micro_batch_tokens * self.arch.hidden_size * self.dtype.itemsize
            between = (policy.num_gpu_batches + 2) * hidden
            rows.append(MemoryRequirement("hidden states between stages", "gpu", between))
        if self.shard is not None and self.arch.has_ends:
            logits = logits_chunk_bytes(self.arch, policy, sizes.max_query_nodes)
            rows.append(MemoryRequirement("logits of the ranks", "gpu", 2 * logits))
        if self.adapters.adapters:
            needed = self.adapters.workspace_bytes(sizes.max_micro_batch_tokens, self.dtype.itemsize)
            rows.append(MemoryRequirement("adapter updates", "gpu", needed))
        drafts = self.speculation if self.arch.has_ends else None
        return rows + (drafts.requirements(sizes.sequence_tokens, self.is_cuda) if drafts else [])


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
    most: int = 0
    """Sequences of a micro-batch that there is room for beside their cache, where these are more than the policy's: the
    block may have as many later in the same job."""

    def on(self, deployment: Deployment) -> EnginePlan:
        """The same decisions for other adapters."""
        weight_plan = deployment.weight_plan(self.policy, self.weight_plan.num_slabs)
        return replace(self, deployment=deployment, weight_plan=weight_plan)

    @property
    def block_policy(self) -> Policy:
        """The policy of the whole block: of all passes that are in flight in a pipeline."""
        count = self.policy.num_gpu_batches * self.deployment.passes_in_flight
        return replace(self.policy, num_gpu_batches=count)

    @property
    def made_for(self) -> Policy:
        """Of the largest block that buffers and graphs suffice for, whenever its places are filled."""
        most = max(self.most, self.policy.gpu_batch_size)
        return replace(self.policy, gpu_batch_size=most, admission_passes=1)

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
        sizes = self.deployment.sizes(self.policy, job.assuming(self.answer_share))
        return replace(sizes, max_micro_batch_tokens=micro_batch_tokens(self.made_for, sizes.max_query_nodes))

    def requirements(self, sizes: BlockSizes) -> list[MemoryRequirement]:
        """Bytes by tier and purpose of the loaded weights and a block of these sizes."""
        rows = self.without_graphs(sizes)
        return rows + graph_requirements(self._graphs_beside(rows, sizes))

    def without_graphs(self, sizes: BlockSizes) -> list[MemoryRequirement]:
        """What a block needs to run at all."""
        return self.deployment.requirements(self.weight_plan, self.made_for, sizes)

    def graphs(self, sizes: BlockSizes) -> Graphs:
        """CUDA graphs that are kept beside a block of these sizes."""
        return self._graphs_beside(self.without_graphs(sizes), sizes)

    def _graphs_beside(self, rows: list[MemoryRequirement], sizes: BlockSizes) -> Graphs:
        gpu, cuda = self.budgets["gpu"], self.deployment.is_cuda
        return graphs_that_fit(self.arch, self.made_for, self.layout, sizes, rows, gpu, cuda)

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


def largest_by_tier(of_ranks: list[list[MemoryRequirement]]) -> list[MemoryRequirement]:
    """Of each tier the rows of the rank that needs most there."""

    def on(rows: list[MemoryRequirement], tier: str) -> list[MemoryRequirement]:
        return [row for row in rows if row.tier == tier]

    return [
        row
        for tier in TIERS
        for row in max((on(rows, tier) for rows in of_ranks), key=lambda rows: sum(row.num_bytes for row in rows))
    ]


def described(policy: Policy) -> str:
    return (
        f"--percent {percent_text(policy.percent)}, {policy.num_gpu_batches} micro-batches of {policy.gpu_batch_size}, "
        f"{policy.cpu_attention:.0%} CPU attention"
        + (f", {policy.cpu_experts:.0%} CPU experts" if policy.cpu_experts else "")
    )
