"""Loads a model: the pools of the three tiers, the transfer queues between them, the weights and the drafts."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch

from flexbatch.memory.files import prepare_offload_dir
from flexbatch.memory.loading import Loader
from flexbatch.memory.tiers import Pool, Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.models.fingerprint import RECORDS, WeightFiles, combined
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.policy.policy import TIERS
from flexbatch.policy.units import duration_text, size_text
from flexbatch.speculative.speculator import Speculator
from flexbatch.trace import Tracer

logger = logging.getLogger("flexbatch")


@dataclass(frozen=True)
class LoadedModel:
    """What lives as long as the engine. ``loaded_bytes`` were read from the checkpoint, ``reused_bytes`` taken from
    an earlier start's files instead."""

    tiers: Tiers
    queues: TransferQueues
    weights: WeightStore
    speculator: Speculator | None
    seconds: float
    loaded_bytes: int
    reused_bytes: int

    def describe(self) -> dict[str, Any]:
        """How long loading took, and what was read."""
        return {"load_seconds": self.seconds, "loaded_bytes": self.loaded_bytes, "reused_bytes": self.reused_bytes}


def load_model(engine_plan: EnginePlan, tracer: Tracer, stack: contextlib.ExitStack) -> LoadedModel:
    """Weights to their tiers. What has to be closed is left on ``stack``, also when loading fails.

    Raises CheckpointError for a bad model, OffloadError for an offload folder that cannot be used.
    """
    started = time.perf_counter()
    config, policy, offload_dir, budgets = (
        engine_plan.config,
        engine_plan.policy,
        engine_plan.offload_dir,
        engine_plan.budgets,
    )
    uses_disk = any(split.disk > 0 for split in (policy.weights, policy.cache, policy.activations))
    keeps_files = config.offload_path is not None
    if uses_disk or keeps_files:
        prepare_offload_dir(offload_dir)
    tiers = Tiers(
        gpu=Pool("gpu", budgets["gpu"], device=engine_plan.device),
        cpu=Pool("cpu", budgets["cpu"], pinned=engine_plan.device.type == "cuda"),
        disk=Pool("disk", budgets["disk"]),
        offload_dir=offload_dir,
    )
    stack.callback(tiers.close)
    queues = TransferQueues(engine_plan.device, tracer)
    stack.callback(queues.close)
    weights = WeightStore(engine_plan.weight_plan, tiers, queues, engine_plan.dtype)
    stack.callback(weights.close)
    loader = make_loader(engine_plan, weights, keeps_files)
    logger.info(
        "loading %s: %s of weights", config.model, size_text(sum(map(engine_plan.weight_plan.tier_bytes, TIERS)))
    )
    with torch.inference_mode():
        loaded_bytes = loader.load(
            lambda skip: engine_plan.model.pieces(skip, config.seed, engine_plan.dtype, packed=True)
        )
    weights.check()
    speculator = None
    if config.simulate_acceptance is not None:
        logger.warning(
            "SIMULATED acceptance %g: drafted tokens are accepted by chance, the text means nothing",
            config.simulate_acceptance,
        )
    if engine_plan.speculation is not None:
        speculator = engine_plan.speculation.load(queues, engine_plan.dtype, offload_dir)
        stack.callback(speculator.close)
    seconds = time.perf_counter() - started
    placed = ", ".join(f"{value:.1f} % {tier}" for tier, value in engine_plan.weight_plan.realized_percent.items())
    read = f"{size_text(loaded_bytes)} read at {loaded_bytes / seconds / 1e9:.2f} GB/s"
    reused = f", {size_text(loader.reused_bytes)} found in the offload folder" if loader.reused_bytes else ""
    logger.info("loaded %s in %s: %s%s; %s", config.model, duration_text(seconds), read, reused, placed)
    return LoadedModel(tiers, queues, weights, speculator, seconds, loaded_bytes, loader.reused_bytes)


def make_loader(engine_plan: EnginePlan, weights: WeightStore, keeps_files: bool) -> Loader:
    """With a folder for converted tensors where some go to the disk tier, or are quantized and kept for the next start.

    The folder is named after everything that tells its tensors from others: the content of the checkpoint (or how
    random weights are drawn) and the dtype as resolved; bits and groups are in the names of the files. Whoever files
    nothing does not pay for digesting a checkpoint.
    """
    tensors = engine_plan.weight_plan.all_tensors
    if not any(tensor.tier == "disk" or (keeps_files and tensor.quantized) for tensor in tensors):
        return Loader(weights, None, cache_quantized=False)
    dtype = str(engine_plan.dtype).removeprefix("torch.")
    if engine_plan.model.folder is None:
        drawn = f"{torch.__version__} {engine_plan.config.seed} {engine_plan.arch}"
        identity = f"dummy-{combined(drawn, ())[:32]}"
        return Loader(weights, engine_plan.offload_dir / f"{identity}-{dtype}", cache_quantized=keeps_files)
    files = WeightFiles(engine_plan.model.folder, engine_plan.offload_dir / RECORDS)
    return Loader(weights, engine_plan.offload_dir / f"{files.identity}-{dtype}", keeps_files, files.check)
