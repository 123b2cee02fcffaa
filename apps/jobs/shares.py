"""Which share of a job and of the host a process has: ranks started by ``torch.distributed.run`` find theirs in the
environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexbatch.config import EngineConfig, parse_bytes
from flexbatch.memory.host_memory import host_memory_bytes
from flexbatch.validation.errors import ConfigurationError


@dataclass(frozen=True)
class Share:
    """Shard ``shard`` of ``shards``, run by process ``local_rank`` of ``local_size`` on this host."""

    shard: int = 0
    shards: int = 1
    local_rank: int = 0
    local_size: int = 1


def find_share(flag: tuple[int, int] | None, environ: Mapping[str, str]) -> Share:
    """The share that ``--shard`` or torchrun gives. With both, the ranks divide the shard among them. Raises
    ConfigurationError."""
    shard, shards = flag or (0, 1)
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return Share(shard, shards)
    try:
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        local_rank, local_size = int(environ.get("LOCAL_RANK", rank)), int(environ.get("LOCAL_WORLD_SIZE", size))
    except ValueError:
        raise ConfigurationError(
            f"RANK={environ['RANK']!r} and WORLD_SIZE={environ['WORLD_SIZE']!r} must be whole numbers"
        ) from None
    if not 0 <= rank < size:
        raise ConfigurationError(f"RANK={rank} must be from 0 to WORLD_SIZE-1={size - 1}")
    return Share(shard * size + rank, shards * size, local_rank, local_size)


def divide_host(config: EngineConfig, share: Share, gpus: int, offload_dir: Path) -> EngineConfig:
    """The engine settings of one of several processes on a host: equal parts of its memory, one of ``gpus`` devices, an
    offload folder of its own.

    Processes share a device where there are fewer devices than processes; then each gets an equal part of the GPU
    budget that was given. Without a GPU the gpu tier is host memory too. ``offload_dir`` is the folder where none is
    set; disk files of two engines in one folder would overwrite each other.
    """
    if share.local_size == 1:
        return config
    tiers = 1 if gpus else 2

    def part(given: int | str | None, processes: int) -> int:
        return (int(host_memory_bytes() * 0.9) // tiers if given is None else parse_bytes(given)) // processes

    folder = Path(config.offload_dir).expanduser() if config.offload_dir else offload_dir
    changes: dict[str, Any] = {
        "cpu_memory": part(config.cpu_memory, share.local_size),
        "offload_dir": str(folder / f"rank-{share.local_rank}"),
    }
    if gpus and config.device in ("auto", "cuda"):
        changes["device"] = f"cuda:{share.local_rank % gpus}"
    if not gpus:
        changes["gpu_memory"] = part(config.gpu_memory, share.local_size)
    elif config.gpu_memory is not None:
        changes["gpu_memory"] = part(config.gpu_memory, -(-share.local_size // gpus))
    return dataclasses.replace(config, **changes)
