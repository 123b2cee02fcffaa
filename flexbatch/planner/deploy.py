"""From settings to a deployment: the model, the device, the budgets, and who has which part of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from flexbatch.config import EngineConfig
from flexbatch.execution.block_sizes import cache_layout
from flexbatch.models.opened import OpenModel, as_configured, open_configured
from flexbatch.models.shard import RankShard
from flexbatch.models.sharding import scale_groups, shards
from flexbatch.models.stage import RankStage
from flexbatch.parallel.channel import RankChannel
from flexbatch.parallel.links import EngineGroup
from flexbatch.planner import adapters, budgets
from flexbatch.planner.engine_plan import Deployment
from flexbatch.planner.stages import stages_of
from flexbatch.policy.hardware import Hardware
from flexbatch.speculative.setup import plan_speculation
from flexbatch.validation.errors import ConfigurationError


def deploy(
    config: EngineConfig,
    model: OpenModel | None,
    machine: Hardware | None,
    dry: bool,
    channel: RankChannel | None,
    group: EngineGroup | None = None,
) -> Deployment:
    """model: the configured one, where it is open already; machine: one that is planned for and need not be this one.
    Raises ConfigurationError, CheckpointError."""
    model = open_configured(config) if model is None else as_configured(model, config)
    model, loras = adapters.configured(config, model)
    device = torch.device(machine.device) if machine is not None else budgets.resolve_device(config.device)
    dtype = budgets.resolve_dtype(config.dtype, model.arch, device)
    if config.data_parallel_size > 1:
        refuse_for_engines(config, device)
    parts = shards_of(config, model) if config.tensor_parallel_size > 1 else ()
    stages: tuple[RankStage, ...] = ()
    if (count := config.pipeline_parallel_size) > 1:
        bits = config.weight_bits
        stages = stages_of(model.arch, count, bits, dtype.itemsize, model.prequantized)
    if parts or stages:
        refuse_one_gpu(config, device)
        refuse_adapters(bool(loras.adapters))
    layout = cache_layout(model.arch, config.cache_bits, dtype)
    speculation = plan_speculation(config, model.arch, model.tokenizer, layout)
    group = group or EngineGroup(config.data_parallel_size)
    whole = Deployment(
        config, model, device, dtype, {}, speculation, loras, parts, stages, channel=channel, group=group
    )
    return replace(whole, budgets=budgets.resolve_budgets(config, device, machine, dry, whole.local_ranks))


def refuse_one_gpu(config: EngineConfig, device: torch.device) -> None:
    """What is meant for one process. Raises ConfigurationError."""
    name = "pipeline_parallel_size" if config.pipeline_parallel_size > 1 else "tensor_parallel_size"
    size = f"{name}={getattr(config, name)}"
    if config.recalibrate:
        raise ConfigurationError(
            f"recalibrate refines the profile of the machine by what one process measures: with {size} leave it out"
        )
    if device.type == "cuda" and device.index:
        raise ConfigurationError(
            f"device={config.device!r} is one GPU: with {size} leave it out, and choose the GPUs with "
            "CUDA_VISIBLE_DEVICES"
        )


def shards_of(config: EngineConfig, model: OpenModel) -> tuple[RankShard, ...]:
    """The part of every rank. Raises ConfigurationError."""
    ranks = config.tensor_parallel_size
    groups = scale_groups(model.arch, (config.weight_bits, *(config.allow_bits or ())), model.formats)
    return tuple(shards(model.arch, ranks, groups))


def refuse_for_engines(config: EngineConfig, device: torch.device) -> None:
    """What several engines that share a line of requests cannot do. Raises ConfigurationError."""
    several = f"data_parallel_size={config.data_parallel_size}"
    if config.recalibrate:
        raise ConfigurationError(
            f"recalibrate refines the profile of the machine by what one process measures: with {several} leave it out"
        )
    if config.compare_plain:
        raise ConfigurationError(
            f"compare_plain runs the same requests twice in one engine: with {several} leave it out, and compare on "
            "one GPU"
        )
    if device.type == "cuda" and device.index:
        raise ConfigurationError(
            f"device={config.device!r} is one GPU: with {several} leave it out, and choose the GPUs with "
            "CUDA_VISIBLE_DEVICES"
        )


def refuse_adapters(there_are_some: bool) -> None:
    """Raises ConfigurationError."""
    if there_are_some:
        raise ConfigurationError(
            "with tensor_parallel_size or pipeline_parallel_size above 1 requests cannot choose LoRA adapters: merge "
            "one into 16-bit weights (--lora NAME=FOLDER --lora-default NAME), or use one GPU"
        )
