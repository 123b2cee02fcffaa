"""The profile of this machine, kept between processes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from flexbatch.calibrate.identity import machine_key
from flexbatch.calibrate.measure import EngineRates, capacities, logger, measure
from flexbatch.calibrate.phases import Phases
from flexbatch.calibrate.profile_file import write_hardware
from flexbatch.policy.hardware import Hardware, read_hardware


def cache_path(cache_folder: Path, device: str, disk_folder: Path) -> Path:
    """The file of this machine's profile."""
    return cache_folder / f"hardware-{machine_key(torch.device(device), disk_folder)[1]}.json"


def cached(
    cache_folder: Path,
    device: str,
    disk_folder: Path,
    engine: EngineRates | None = None,
    refresh: bool = False,
    phases: Phases | None = None,
) -> Hardware:
    """The machine's profile from ``cache_folder``, measured at first use, and again where the file is damaged or of
    another version. engine: as for `measure.measure`."""
    path = cache_path(cache_folder, device, disk_folder)
    hardware = None
    if path.is_file() and not refresh:
        with contextlib.suppress(OSError, ValueError):
            hardware = read_hardware(path)
    if hardware is not None:
        return hardware.with_memory(
            *(
                capacities(torch.device(device), disk_folder)[f"{tier}_bytes"]
                for tier in ("gpu_memory", "cpu_memory", "disk")
            )
        )
    hardware = measure(device, disk_folder, engine, phases)
    try:
        write_hardware(hardware, path)
    except OSError as error:
        # What was measured is right for this process, wherever the next one will find it.
        logger.warning("the profile of this machine cannot be kept, and is measured at every start: %s", error)
    return hardware
