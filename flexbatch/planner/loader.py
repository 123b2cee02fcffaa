"""Places a model: the pools of the three tiers, the transfer queues between them, the weights and the drafts."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexbatch.execution.kernels_ahead import Announced, Compiled, compiled_ahead
from flexbatch.execution.planned_kernels import kinds_of, launch_all
from flexbatch.execution.set_up import load_kernels
from flexbatch.memory import loading
from flexbatch.memory.file_writer import FILE_WRITERS
from flexbatch.memory.files import align, prepare_offload_dir
from flexbatch.memory.host_memory import host_memory_bytes
from flexbatch.memory.loading import FILE_BYTES, Key, Loader
from flexbatch.memory.moving import move_weights
from flexbatch.memory.tiers import Pool, Tiers
from flexbatch.memory.transfer import TransferQueues
from flexbatch.memory.weights import WeightStore
from flexbatch.models.fingerprint import RECORDS, WeightFiles, combined
from flexbatch.models.quantized.scheme import QuantizedPiece
from flexbatch.models.sharding import sharded
from flexbatch.models.specs import Piece, weight_specs
from flexbatch.models.stage import staged
from flexbatch.parallel import numa
from flexbatch.planner.engine_plan import Deployment, EnginePlan
from flexbatch.planner.leader import lead
from flexbatch.planner.start_engines import open_engines
from flexbatch.policy.policy import TIERS
from flexbatch.policy.units import duration_text, size_text
from flexbatch.speculative.draft import RESIDENT
from flexbatch.speculative.speculator import Speculator
from flexbatch.trace import Tracer

logger = logging.getLogger("flexbatch")

COMPILED_BYTES = 256 << 20
"""Of weights, from which on kernels are compiled before passes launch them: a job of a smaller model is over before all
are there that it may launch, and launches a third of them."""


class PlacedModel:
    """The pools of the three tiers and the queues between them, and once a job is known, weights and drafts.

    ``loaded_bytes`` were read from the checkpoint, ``reused_bytes`` taken from an earlier start's files instead.
    """

    def __init__(self, deployment: Deployment, tracer: Tracer) -> None:
        """Raises OffloadError for an offload folder that cannot be used."""
        config, device, budgets = deployment.config, deployment.device, deployment.budgets
        self.keeps_files = config.offload_path is not None
        if self.keeps_files:
            prepare_offload_dir(deployment.offload_dir)
        self.seconds, self.loaded_bytes, self.reused_bytes = 0.0, 0, 0
        self.compiled = Compiled()
        """Kernels, before passes launched them."""
        self.stages: dict[str, float] = {}
        """Seconds of the last load by stage, of all its threads together."""
        self.weights: WeightStore | None = None
        self._loader: Loader | None = None
        """Which may still write files of the weights as they lie."""
        self.speculator: Speculator | None = None
        self._stack, self._loaded = contextlib.ExitStack(), contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.tiers = Tiers(
                gpu=Pool("gpu", budgets["gpu"], device=device),
                cpu=Pool("cpu", budgets["cpu"], pinned=device.type == "cuda"),
                disk=Pool("disk", budgets["disk"]),
                offload_dir=deployment.offload_dir,
            )
            stack.callback(self.tiers.close)
            self.queues = TransferQueues(device, tracer)
            stack.callback(self.queues.close)
            self.others = open_engines(deployment) if deployment.rank == 0 else None
            """Engines that share the line of requests with this one."""
            if self.others is not None:
                stack.callback(self.others.close)
            self.leader = lead(deployment) if deployment.rank == 0 else None
            """Of the other ranks; None on one of them, and where there are none."""
            if self.leader is not None:
                stack.callback(self.leader.close)
            if deployment.local_ranks > 1 and device.type == "cuda":
                # Not before other ranks are started: they would inherit the cores, which may be far from their GPUs.
                stack.callback(numa.run_near(device, deployment.local_ranks))
            self._stack = stack.pop_all()

    def place(self, engine_plan: EnginePlan) -> tuple[WeightStore, Speculator | None]:
        """Load weights and drafts as planned, or move the weights that are loaded. What fails leaves nothing loaded,
        or weights that lay as planned as they were.

        Raises CheckpointError for a bad model, OffloadError for an offload folder that cannot be used.
        """
        policy = engine_plan.policy
        if any(split.disk > 0 for split in (policy.weights, policy.cache, policy.activations)):
            prepare_offload_dir(engine_plan.offload_dir)
        load_kernels(self.queues.device, policy)
        stays = self.weights is not None and self.weights.plan == engine_plan.weight_plan
        try:
            with self._kernels_compiled(engine_plan):
                if self.weights is None:
                    self._load(engine_plan)
                elif not stays:
                    self._move(self.weights, engine_plan)
        except BaseException as error:
            if not stays:
                self._unload()
            # The frames of the error hold what was loaded for as long as it is handled, and longer at a prompt.
            traceback.clear_frames(error.__traceback__)
            raise
        assert self.weights is not None
        return self.weights, self.speculator

    def _kernels_compiled(self, engine_plan: EnginePlan) -> contextlib.AbstractContextManager[None]:
        """Beside the body, what passes will launch on a GPU."""
        size = sum(map(engine_plan.weight_plan.tier_bytes, TIERS))
        if self.queues.device.type != "cuda" or size < COMPILED_BYTES:
            return contextlib.nullcontext()
        sharers = engine_plan.deployment.local_ranks
        coming = engine_plan.weight_plan.tier_bytes("cpu") if self.weights is None else 0
        free = host_memory_bytes() - sharers * coming
        return compiled_ahead(self.queues.device, planned_kernels(engine_plan), self._note_compiled, sharers, free)

    def _note_compiled(self, compiled: Compiled) -> None:
        self.compiled += compiled

    def _load(self, engine_plan: EnginePlan) -> None:
        started, config = time.perf_counter(), engine_plan.config
        self.weights = WeightStore(engine_plan.weight_plan, self.tiers, self.queues, engine_plan.dtype)
        self._loaded.callback(self.weights.close)
        self._loader = loader = make_loader(engine_plan, self.weights, self.keeps_files)
        self._loaded.callback(loader.close)
        size = size_text(sum(map(engine_plan.weight_plan.tier_bytes, TIERS)))
        logger.info("loading %s: %s of weights", config.model, size)
        with torch.inference_mode():
            read = loader.load(partial(pieces_of, engine_plan))
        self.loaded_bytes += read
        self.reused_bytes += loader.reused_bytes
        self.stages = loader.stages.seconds
        self.weights.check()
        if config.simulate_acceptance is not None:
            logger.warning(
                "SIMULATED acceptance %g: drafted tokens are accepted by chance, the text means nothing",
                config.simulate_acceptance,
            )
        if engine_plan.speculation is not None:
            offload_dir = engine_plan.offload_dir
            self.speculator = engine_plan.speculation.load(self.queues, engine_plan.dtype, offload_dir)
            self._loaded.callback(self.speculator.close)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        rate = f"{size_text(read)} read at {read / seconds / 1e9:.2f} GB/s"
        reused = f", {size_text(loader.reused_bytes)} found in the offload folder" if loader.reused_bytes else ""
        told = config.model, duration_text(seconds), rate, reused, shares(engine_plan)
        logger.info("loaded %s in %s: %s%s; %s", *told)

    def _move(self, weights: WeightStore, engine_plan: EnginePlan) -> None:
        started, adapters = time.perf_counter(), engine_plan.deployment.adapters
        if self._loader is not None:
            self._loader.close()
        with torch.inference_mode():
            moved = move_weights(weights, engine_plan.weight_plan, partial(adapters.tensor, dtype=engine_plan.dtype))
        seconds = time.perf_counter() - started
        self.seconds += seconds
        what = f"moved {size_text(moved)} of weights" if moved else f"placed adapters {', '.join(adapters.names)}"
        logger.info("%s in %s: %s", what, duration_text(seconds), shares(engine_plan))

    def _unload(self) -> None:
        self.weights, self.speculator, self._loader = None, None, None
        self._loaded.close()

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Leaves nothing open where the body raises."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def describe(self) -> dict[str, Any]:
        """How long loading and moving took, what was read, and the kernels that were compiled meanwhile."""
        return {
            "load_seconds": self.seconds,
            "load_stages": dict(self.stages),
            "loaded_bytes": self.loaded_bytes,
            "reused_bytes": self.reused_bytes,
            "compiled_ahead": asdict(self.compiled),
        }

    def close(self) -> None:
        with self._stack:
            self._unload()


def planned_kernels(engine_plan: EnginePlan) -> Announced:
    """Those of a plan's passes, and of its drafts'."""
    drafting, dtype, policy = engine_plan.speculation, engine_plan.dtype, engine_plan.policy
    nodes = 0 if drafting is None else drafting.grown_nodes
    own = kinds_of(engine_plan.weight_plan, engine_plan.layout, dtype, policy, nodes)
    drafts = () if drafting is None or not engine_plan.arch.has_ends else drafting.drafts
    return Announced(
        launch_all, (own, *(kinds_of(draft.weights, draft.layout, dtype, RESIDENT, nodes) for draft in drafts))
    )


def pieces_of(engine_plan: EnginePlan, skip: set[Key]) -> Iterator[Piece | QuantizedPiece]:
    """The tensors of this rank, without those in ``skip``, and of its adapters. Layers of other stages are not read."""
    dtype, deployment, arch = engine_plan.dtype, engine_plan.deployment, engine_plan.model.arch
    stage, unread = deployment.stage, skip
    if stage is not None:
        here = {
            (spec.layer, spec.role): stage.here(spec.layer, spec.role, arch.num_layers) for spec in weight_specs(arch)
        }
        unread = {key for key, found in here.items() if found is None or found in skip}
    pieces = engine_plan.model.pieces(unread, engine_plan.config.seed, dtype, packed=True)
    if deployment.shard is not None:
        pieces = sharded(pieces, arch, deployment.shard)
    yield from pieces if stage is None else staged(pieces, stage, arch.num_layers)
    yield from engine_plan.deployment.adapters.pieces(dtype)


def shares(engine_plan: EnginePlan) -> str:
    """Of the weights, on each tier."""
    return ", ".join(f"{value:.1f} % {tier}" for tier, value in engine_plan.weight_plan.realized_percent.items())


def make_loader(engine_plan: EnginePlan, weights: WeightStore, keeps_files: bool) -> Loader:
    """With a folder for converted tensors where some go to the disk tier, or are quantized and kept for the next start.

    The folder is named after everything that tells its tensors from others: the content of the checkpoint (or how
    random weights are drawn), a merged adapter, and the dtype as resolved; bits and groups are in the names of the
    files. Whoever files nothing does not pay for digesting a checkpoint.
    """
    tensors = engine_plan.weight_plan.all_tensors
    if not any(tensor.tier == "disk" or (keeps_files and tensor.quantized) for tensor in tensors):
        return Loader(weights, None, cache_quantized=False)
    later = writes_beside_job(engine_plan, weights)
    dtype, adapter = str(engine_plan.dtype).removeprefix("torch."), engine_plan.model.adapter
    if adapter is not None:
        dtype = f"{adapter.digest}-{dtype}"
    if (shard := engine_plan.deployment.shard) is not None:
        dtype = f"{dtype}-rank-{shard.rank}-of-{shard.ranks}"
    if (stage := engine_plan.deployment.stage) is not None:
        dtype = f"{dtype}-layers-{stage.first}-to-{stage.end}"
    if engine_plan.model.folder is None:
        drawn = f"{torch.__version__} {engine_plan.config.seed} {engine_plan.model.arch}"
        identity = f"dummy-{combined(drawn, ())[:32]}"
        return Loader(weights, engine_plan.offload_dir / f"{identity}-{dtype}", keeps_files, beside_job=later)
    known = any(engine_plan.offload_dir.glob(f"*-{dtype}"))
    files = WeightFiles(engine_plan.model.folder, engine_plan.offload_dir / RECORDS, later=not known)
    if known:
        return Loader(
            weights, engine_plan.offload_dir / f"{files.identity}-{dtype}", keeps_files, files.check, None, later
        )
    # There is nothing that could be reused: the checkpoint is digested while it is loaded.
    folder: Future[Path] = Future()

    def digest() -> None:
        try:
            folder.set_result(engine_plan.offload_dir / f"{files.identity}-{dtype}")
        except BaseException as error:
            folder.set_exception(error)

    threading.Thread(target=digest, name="flexbatch-identity", daemon=True).start()
    return Loader(weights, folder, keeps_files, files.check, None, later)


def writes_beside_job(engine_plan: EnginePlan, weights: WeightStore) -> bool:
    """Whether files for the next start can be written while the job runs: all of it is on a GPU, where it neither needs
    the disk nor much host memory, of which there is enough left for their buffers and for what the job allocates
    there, inputs for instance."""
    policy, host = engine_plan.policy, weights.tiers.cpu
    on_gpu = min(split.gpu for split in (policy.weights, policy.cache, policy.activations)) > 1 - 1e-6
    largest = max((each.num_bytes for each in engine_plan.weight_plan.all_tensors if each.quantized), default=0)
    enough = host.budget_bytes - host.total_used_bytes >= FILE_WRITERS * align(largest) + FILE_BYTES
    return loading.BESIDE_JOB and weights.device.type == "cuda" and on_gpu and enough
