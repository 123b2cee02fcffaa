"""The measured machine that plans are made for: named by the user, read from the user's cache folder, or measured at
first use."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from flexbatch.calibrate.profile_file import write_hardware
from flexbatch.kernels.native_cache import user_cache_folder
from flexbatch.policy.hardware import Hardware, load_hardware, read_hardware
from flexbatch.policy.units import duration_text
from flexbatch.validation.devices import AUTO
from flexbatch.validation.errors import ConfigurationError, LostRankError

logger = logging.getLogger("flexbatch")

IDLE_SECONDS = {"cpu": 10.0, "cuda": 30.0}
"""What a profile takes on an idle machine; it grows with the processes that share the cores."""
PATIENCE_SECONDS = 20.0


def default_profile_dir() -> Path:
    return user_cache_folder("profiles")


def known_machine(device: torch.device, disk_folder: Path, cache_folder: Path) -> Hardware | None:
    """The profile of this machine that an earlier start has left in the cache folder; None where there is none."""
    from flexbatch.calibrate.cache import cache_path

    while not disk_folder.exists():
        disk_folder = disk_folder.parent
    path = cache_path(cache_folder, str(device), disk_folder)
    if not path.is_file():
        return None
    try:
        return read_hardware(path)
    except (OSError, ValueError) as error:
        logger.warning(
            "the profile of this machine, %s, cannot be used and is made anew: %s", path, str(error).splitlines()[0]
        )
        return None


def this_machine(
    device: torch.device, disk_folder: Path, cache_folder: Path, measure: bool = True, gpus: int = 1
) -> Hardware:
    """The cached profile of this machine, else a measured one; a shipped one where measuring is not wanted or would
    take long. gpus: of this host, that it is wanted for: what is between them is measured when it is first needed."""
    hardware = of_one_gpu(device, disk_folder, cache_folder, measure)
    gpus = min(gpus, torch.cuda.device_count())
    if not measure or device.type != "cuda" or gpus == 1:
        return hardware
    from flexbatch.calibrate.interconnect import lacks_interconnect, with_interconnect

    if not lacks_interconnect(hardware, gpus):
        return hardware
    logger.info("measuring once how %d GPUs of this host work together, about 10 s", gpus)
    try:
        hardware = with_interconnect(hardware, gpus)
        write_hardware(hardware, profile_path(AUTO, device, disk_folder, cache_folder))
    except OSError as error:
        logger.warning("what was measured between GPUs cannot be kept: %s", error)
    except (LostRankError, RuntimeError) as error:
        logger.warning("what is between GPUs was not measured, and counts as the bus: %s", error)
    return hardware


def of_one_gpu(device: torch.device, disk_folder: Path, cache_folder: Path, measure: bool) -> Hardware:
    """`this_machine`, without what is between GPUs."""
    from flexbatch.calibrate.cache import cache_path, cached

    known = known_machine(device, disk_folder, cache_folder)
    if known is not None:
        return known
    while not disk_folder.exists():
        disk_folder = disk_folder.parent
    path = cache_path(cache_folder, str(device), disk_folder)
    expected = IDLE_SECONDS[device.type] * max(1.0, (os.getloadavg()[0] + 1) / (os.cpu_count() or 1))
    if measure and (device.type == "cuda" or expected <= PATIENCE_SECONDS):
        from flexbatch.calibrate.engine_kernels import EngineKernels
        from flexbatch.calibrate.phases import Phases

        logger.info(
            "measuring this machine's links, processors and disk once, about %s; --hardware %s skips it",
            *(duration_text(expected), shipped_for(device)),
        )
        phases, engine = Phases(), EngineKernels(str(device))
        hardware = cached(cache_folder, str(device), disk_folder, engine, phases=phases)
        logger.info("measured %s (%s) -> %s", hardware.name, phases.text, path)
        if engine.text:
            logger.info("%s", engine.text)
        return hardware
    why = (
        f"measuring would take about {expected:.0f} s at a load of {os.getloadavg()[0]:.1f}"
        if measure
        else "nothing is measured for a dry run"
    )
    shipped = shipped_for(device)
    logger.warning(
        "no profile of this machine: planned with the shipped %s.json and this machine's memory (%s)", shipped, why
    )
    return load_hardware(shipped)


def shipped_for(device: torch.device) -> str:
    return "h200" if device.type == "cuda" else "cpu"


def profile_path(setting: str, device: torch.device, disk_folder: Path, cache_folder: Path) -> Path:
    """The file that --recalibrate writes: the user's, or this machine's in the cache folder. Raises
    ConfigurationError for a shipped machine."""
    from flexbatch.calibrate.cache import cache_path

    if setting == AUTO:
        while not disk_folder.exists():
            disk_folder = disk_folder.parent
        return cache_path(cache_folder, str(device), disk_folder)
    path = Path(setting).expanduser()
    if not path.is_file():
        raise ConfigurationError(
            f"--recalibrate refines a profile of yours: --hardware {setting} is a shipped one; leave it out or name "
            "a JSON file"
        )
    return path
