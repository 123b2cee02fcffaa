"""What a result was measured on."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexbatch.policy.stdout import data_apart


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


def publish(measure: Callable[[], dict[str, Any]], output: Path | None) -> int:
    """Measure, print the machine and what was measured as JSON, and write it to ``output`` as well. Returns 0."""
    return publish_each(lambda: iter([measure()]), output)


def publish_each(measure: Callable[[], Iterator[dict[str, Any]]], output: Path | None) -> int:
    """The same for reports that tell more and more: each is written once it is there, so that a run which is ended
    keeps what it has, and the last is printed."""
    with data_apart() as stdout:
        about, text = machine(), ""
        for report in measure():
            text = json.dumps({"machine": about, **report}, indent=1, default=str)
            if output is not None:
                output.write_text(text + "\n", encoding="utf-8")
        print(text, file=stdout)
    return 0


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
