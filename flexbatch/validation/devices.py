"""Names of compute devices, dtypes and machines, checked without torch, whose import takes ten seconds or more."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexbatch.policy.suggest import did_you_mean
from flexbatch.validation.errors import ConfigurationError, reason

if TYPE_CHECKING:
    from flexbatch.policy.hardware import Hardware

AUTO = "auto"
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
GPU_FILES = ("nvidiactl", "nvidia[0-9]*", "nvhost-ctrl*", "nvmap", "dxg", "kfd")
"""In /dev, of the drivers for CUDA: of cards, of boards with one memory, below Windows, and ROCm's."""


def check_device(name: str, device_folder: Path = Path("/dev")) -> None:
    """Raises ConfigurationError for what is no device, and for a GPU on a machine that has no driver of one."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", name):
        raise ConfigurationError(
            f"device {name!r} is not known{did_you_mean(name, DEVICES)} (auto, cpu, cuda or cuda:N)"
        )
    if name.startswith("cuda") and not any(next(device_folder.glob(file), None) for file in GPU_FILES):
        raise ConfigurationError(
            f"device {name!r} was asked for, but this machine has no CUDA device (no driver of one is in "
            f"{device_folder}); use --device cpu"
        )


def check_dtype(name: str, known: Sequence[str] = DTYPES) -> None:
    """Raises ConfigurationError."""
    if name != "auto" and name not in known:
        raise ConfigurationError(f"dtype {name!r} is not known{did_you_mean(name, known)} (auto, {', '.join(known)})")


def named_machine(name: str, flag: str = "--hardware") -> Hardware | None:
    """The machine that a setting names; None for "auto". Raises ConfigurationError."""
    if name == AUTO:
        return None
    from flexbatch.policy.hardware import load_hardware  # with NumPy 0.1 s, which "auto" does not need

    try:
        return load_hardware(name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{flag} {name}: {reason(error)}") from error
