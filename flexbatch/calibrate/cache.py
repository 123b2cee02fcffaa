"""The profile of this machine, kept between processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flexbatch.calibrate.profile import _capacities, logger, measure
from flexbatch.policy.hardware import Hardware, read_hardware, write_hardware


def machine_key(device: torch.device, disk_folder: Path) -> tuple[str, str]:
    """(readable name, short hash) of what a profile depends on: GPU and driver, processor and cores, the disk."""
    parts = [_processor(), f"{os.cpu_count()} cores"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts = [properties.name, f"{properties.total_memory / 2**30:.0f} GiB", f"CUDA {torch.version.cuda}", *parts]
    name = ", ".join(parts)
    stat = os.stat(disk_folder) if disk_folder.exists() else None
    return name, hashlib.sha256(
        f"{name} disk {stat.st_dev if stat else None} torch {torch.__version__}".encode()
    ).hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else "unknown processor"


def cache_path(cache_folder: Path, device: str, disk_folder: Path) -> Path:
    """The file of this machine's profile."""
    return cache_folder / f"hardware-{machine_key(torch.device(device), disk_folder)[1]}.json"


def cached(
    cache_folder: Path,
    device: str,
    disk_folder: Path,
    overrides: Mapping[str, Any] | None = None,
    refresh: bool = False,
) -> Hardware:
    """The machine's profile from ``cache_folder``, measured at first use, and again where the file is damaged or of
    another version."""
    path = cache_path(cache_folder, device, disk_folder)
    hardware = None
    if path.is_file() and not refresh:
        with contextlib.suppress(OSError, ValueError):
            hardware = read_hardware(path)
    if hardware is not None:
        return hardware.with_memory(
            *(
                _capacities(torch.device(device), disk_folder)[f"{tier}_bytes"]
                for tier in ("gpu_memory", "cpu_memory", "disk")
            )
        )
    hardware = measure(device, disk_folder, overrides)
    try:
        write_hardware(hardware, path)
    except OSError as error:
        # What was measured is right for this process, wherever the next one will find it.
        logger.warning("the profile of this machine cannot be kept, and is measured at every start: %s", error)
    return hardware
