"""The machine that plans are made for: named, remembered or measured, and corrected by what runs have shown."""

from __future__ import annotations

from pathlib import Path

from flexbatch.calibrate import machine
from flexbatch.calibrate.profile_file import write_hardware
from flexbatch.config import EngineConfig
from flexbatch.planner.engine_plan import Deployment
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.shared_host import shared_by


class PlannedMachine:
    """One rank's part of the machine. Nothing is measured before something has to be weighed, and never with ``dry``.

    ``profile_path``: the file that ``--recalibrate`` corrects; None without.
    """

    def __init__(
        self, config: EngineConfig, deployment: Deployment, offload_dir: Path, named: Hardware | None, dry: bool
    ) -> None:
        """named: what --hardware stands for, or a machine that no name stands for."""
        self.deployment, self.offload_dir, self.dry = deployment, offload_dir, dry
        self.tensor_ranks = config.tensor_parallel_size
        self.profile_path: Path | None = None
        if config.recalibrate:
            folder = machine.default_profile_dir()
            self.profile_path = machine.profile_path(config.hardware, deployment.device, offload_dir, folder)
        self.found = named and self.of_a_rank(named)
        """None as long as nobody has asked."""

    def of_a_rank(self, whole: Hardware) -> Hardware:
        return shared_by(whole, self.deployment.local_ranks, self.tensor_ranks)

    @property
    def hardware(self) -> Hardware:
        """Measured at first use, where it is neither named nor remembered."""
        if self.found is None:
            key = self.deployment.device, self.offload_dir, machine.default_profile_dir(), not self.dry
            self.found = self.of_a_rank(machine.this_machine(*key, self.deployment.local_ranks))
        return self.found

    @property
    def known(self) -> Hardware | None:
        """The machine as far as it is known without measuring anything."""
        if self.found is not None:
            return self.found
        remembered = machine.known_machine(self.deployment.device, self.offload_dir, machine.default_profile_dir())
        return remembered and self.of_a_rank(remembered)

    def recalibrate(self, hardware: Hardware) -> None:
        """Plan for the machine as runs have shown it, here and, with --recalibrate, in later processes."""
        self.found = hardware
        if self.profile_path is not None:
            write_hardware(hardware, self.profile_path)
