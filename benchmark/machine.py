"""What a result was measured on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def machine() -> dict[str, str]:
    """Machine, versions and commit of a result."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    info = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "processor": processor(),
    }
    if torch.cuda.is_available():
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        info |= {"gpu": torch.cuda.get_device_name(0), "driver": driver.stdout.strip()}
    return info


def processor() -> str:
    """Its name where Linux tells it, the architecture elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {len(names)} x {names[0]}" if names else platform.machine()
