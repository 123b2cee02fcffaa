"""A model in its homes: the pools of the three tiers, the lanes between them, its weights and its drafts."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flexbatch.memory.files import prepare_offload_dir
from flexbatch.memory.loading import Loader
from flexbatch.memory.tiers import Pool, Tiers
from flexbatch.memory.transfer import Lanes
from flexbatch.memory.weights import WeightStore
from flexbatch.models import checkpoint
from flexbatch.models.checkpoint import Piece, QuantizedPiece
from flexbatch.models.dummy import dummy
from flexbatch.models.fingerprint import RECORDS, WeightFiles, combined
from flexbatch.planner.engine_plan import Decisions
from flexbatch.speculative.speculator import Speculator
from flexbatch.trace import Tracer

logger = logging.getLogger("flexbatch")


@dataclass(frozen=True)
class LoadedModel:
    """What lives as long as the engine. ``loaded_bytes`` were read from the checkpoint, ``reused_bytes`` taken from an earlier start's files instead."""

    tiers: Tiers
    lanes: Lanes
    weights: WeightStore
    speculator: Speculator | None
    seconds: float
    loaded_bytes: int
    reused_bytes: int


def load_model(decided: Decisions, tracer: Tracer, stack: contextlib.ExitStack) -> LoadedModel:
    """Weights to their homes. What has to be closed is left on ``stack``, also when loading fails.

    Raises CheckpointError for a bad model, OffloadError for an offload folder that cannot be used.
    """
    started = time.perf_counter()
    config, policy, offload_dir, budgets = decided.config, decided.policy, decided.offload_dir, decided.budgets
    uses_disk = any(split.disk > 0 for split in (policy.weights, policy.cache, policy.activations))
    keeps_files = config.offload_path is not None
    if uses_disk or keeps_files:
        prepare_offload_dir(offload_dir)
    tiers = Tiers(
        gpu=Pool("gpu", budgets["gpu"], device=decided.device),
        cpu=Pool("cpu", budgets["cpu"], pinned=decided.device.type == "cuda"),
        disk=Pool("disk", budgets["disk"]),
        offload_dir=offload_dir,
    )
    stack.callback(tiers.close)
    lanes = Lanes(decided.device, tracer)
    stack.callback(lanes.close)
    weights = WeightStore(decided.weight_plan, tiers, lanes, decided.dtype)
    stack.callback(weights.close)
    loader = make_loader(decided, weights, keeps_files)
    with torch.inference_mode():
        loaded_bytes = loader.load(lambda skip: pieces(decided, skip))
    weights.check()
    speculator = None
    if decided.speculation is not None:
        speculator = decided.speculation.load(lanes, decided.dtype, offload_dir)
        stack.callback(speculator.close)
    seconds = time.perf_counter() - started
    homes = ", ".join(f"{value:.1f} % {tier}" for tier, value in decided.weight_plan.realized_percent.items())
    logger.info("loaded %s in %.1f s: %s", config.model, seconds, homes)
    return LoadedModel(tiers, lanes, weights, speculator, seconds, loaded_bytes, loader.reused_bytes)


def make_loader(decided: Decisions, weights: WeightStore, keeps_files: bool) -> Loader:
    """With a folder for converted tensors where some go to the disk tier, or are quantised and kept for the next start.

    The folder is named after everything that tells its tensors from others: the content of the checkpoint (or how
    random weights are drawn) and the dtype as resolved; bits and groups are in the names of the files. Whoever files
    nothing does not pay for digesting a checkpoint.
    """
    tensors = decided.weight_plan.all_tensors
    if not any(tensor.tier == "disk" or (keeps_files and tensor.quantized) for tensor in tensors):
        return Loader(weights, None, cache_quantized=False)
    dtype = str(decided.dtype).removeprefix("torch.")
    if decided.folder is None:
        drawn = f"{torch.__version__} {decided.config.seed} {decided.arch}"
        identity = f"dummy-{combined(drawn, ())[:32]}"
        return Loader(weights, decided.offload_dir / f"{identity}-{dtype}", cache_quantized=keeps_files)
    files = WeightFiles(decided.folder, decided.offload_dir / RECORDS)
    return Loader(weights, decided.offload_dir / f"{files.identity}-{dtype}", keeps_files, files.check)


def pieces(decided: Decisions, skip: set[tuple[int, str]]) -> Iterator[Piece | QuantizedPiece]:
    """The checkpoint's stream, or random weights, without the (layer, role) pairs in ``skip``."""
    if decided.folder is not None:
        yield from checkpoint.stream(decided.folder, decided.arch, skip, packed=True)
        return
    for piece in dummy(decided.arch, decided.config.seed, decided.dtype):
        if (piece.layer, piece.role) not in skip:
            yield piece
