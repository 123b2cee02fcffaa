"""Which machine this is, so that a profile is not taken for another one's."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch


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
