"""What a result was measured on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def machine() -> dict[str, str]:
    """Machine, versions and commit of a result."""
    import torch

    info = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _output("git", "rev-parse", "HEAD") or "unknown",
        "processor": processor(),
    }
    if torch.cuda.is_available():
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        info |= {"gpu": torch.cuda.get_device_name(0), "driver": driver}
    return info


def processor() -> str:
    """Its name where Linux tells it, the architecture elsewhere."""
    names = processor_names()
    return f"{platform.machine()}, {len(names)} x {names[0]}" if names else platform.machine()


def processor_names() -> list[str]:
    """The name of every core where Linux tells it, none elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]


def _output(*command: str) -> str:
    """What a command prints; empty where it is not installed or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
