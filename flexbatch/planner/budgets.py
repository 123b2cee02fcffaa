"""From settings, model and machine to budgets and exact sizes, before anything is loaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from flexbatch.config import EngineConfig, parse_bytes
from flexbatch.memory.host_memory import host_memory_bytes
from flexbatch.models.arch import Arch
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.units import size_text
from flexbatch.validation.errors import ConfigurationError

logger = logging.getLogger("flexbatch")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The compute device. Raises ConfigurationError when a GPU is asked for and none is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigurationError(
                f"device {name!r} was asked for, but torch {torch.__version__} finds no CUDA device; use --device cpu"
            )
        device = torch.device("cuda", device.index or 0)
    return device


def resolve_dtype(name: str, arch: Arch, device: torch.device) -> torch.dtype:
    """The compute dtype: on the CPU float32 unless asked otherwise; on a GPU the checkpoint's 16-bit type, bfloat16
    for float32 checkpoints."""
    if name != "auto":
        if name not in DTYPES:
            raise ConfigurationError(f"dtype {name!r} is not known; use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if arch.dtype == "float16" else torch.bfloat16


def resolve_budgets(
    config: EngineConfig,
    device: torch.device,
    machine: Hardware | None = None,
    dry: bool = False,
    local_ranks: int = 1,
) -> dict[str, int]:
    """Bytes of every tier, of this machine or of a named one. Without a GPU, gpu and cpu tier are the same memory:
    half of what is available each. What is given above what there is is capped, unless the plan is ``dry``.

    Of several ranks on the host each has a GPU, or the gpu tier that was given, of its own, and an equal part of the
    host's memory and disk.
    """
    found = _resolve_host(config, device, machine, dry)
    shared = {"cpu", "disk"} if device.type == "cuda" or config.gpu_memory is not None else set(found)
    return {tier: size // local_ranks if tier in shared else size for tier, size in found.items()}


def _resolve_host(config: EngineConfig, device: torch.device, machine: Hardware | None, dry: bool) -> dict[str, int]:
    given = {
        tier: parse_bytes(size)
        for tier, size in (("gpu", config.gpu_memory), ("cpu", config.cpu_memory))
        if size is not None
    }
    if machine is not None:
        gpu, cpu = (
            machine.gpu_memory_bytes - machine.gpu_reserved_bytes,
            machine.cpu_memory_bytes - machine.cpu_reserved_bytes,
        )
        return {"gpu": gpu, "cpu": cpu, "disk": machine.disk_bytes, **given}
    available = host_memory_bytes()
    if device.type == "cuda":
        there = {"gpu": torch.cuda.mem_get_info(device)[0], "cpu": available}
        free = {"gpu": int(there["gpu"] * 0.94), "cpu": int(available * 0.9)}
    else:
        there = dict.fromkeys(("gpu", "cpu"), available)
        free = dict.fromkeys(("gpu", "cpu"), int(available * 0.45))
    folder = offload_dir(config)
    while not folder.exists():
        folder = folder.parent
    space = os.statvfs(folder)
    return {**free, "disk": space.f_bavail * space.f_frsize, **within(given, there, free, dry)}


def within(given: dict[str, int], there: dict[str, int], free: dict[str, int], dry: bool) -> dict[str, int]:
    """The budgets that were given, and ``free`` instead of those above what is ``there``; each with a line in the
    log. A plan that is not run (``dry``) may be for more memory than this machine has."""
    budgets = dict(given)
    for tier, size in given.items():
        if size <= there[tier]:
            continue
        told = f"--{tier}-memory {size_text(size)} is more than the {size_text(there[tier])} that are free here"
        if dry:
            logger.warning("%s: the plan is for a machine that has it", told)
        else:
            logger.warning("%s: going on with %s", told, size_text(free[tier]))
            budgets[tier] = free[tier]
    return budgets


def default_offload_dir() -> Path:
    return Path(os.path.expanduser("~")) / ".cache" / "flexbatch" / "offload"


def offload_dir(config: EngineConfig) -> Path:
    """The folder of the disk tier, and of what is kept between starts: converted weights and digests."""
    return config.offload_path or default_offload_dir()
