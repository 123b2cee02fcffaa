"""The clock and the power of the GPU while something runs on it: a card at its power limit slows down."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from typing import Any

import torch

INTERVAL_MS = 100
FIELDS = {"clocks.sm": "sm_clock_mhz", "clocks.max.sm": "largest_sm_clock_mhz", "power.draw": "power_watts"}
FIELDS |= {"power.limit": "power_limit_watts", "temperature.gpu": "temperature_celsius"}


class CardState:
    """Samples of a GPU of torch within a ``with``; none where nvidia-smi is not there."""

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> CardState:
        self.output = tempfile.TemporaryFile("w+")
        # By its UUID: torch counts visible devices, nvidia-smi all of them.
        uuid = torch.cuda.get_device_properties(self.device).uuid if torch.cuda.is_available() else self.device
        command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(FIELDS)}"]
        command += ["--format=csv,noheader,nounits", f"--loop-ms={INTERVAL_MS}"]
        try:
            self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self.process = None
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        self.output.seek(0)
        self.lines = self.output.read().splitlines()
        self.output.close()

    def report(self) -> dict[str, Any]:
        """Means over the samples, and their number."""
        samples = [[float(cell) for cell in row] for row in (line.split(",") for line in self.lines) if numbers(row)]
        means = (round(statistics.fmean(column), 1) for column in zip(*samples, strict=True))
        return {"samples": len(samples), **dict(zip(FIELDS.values(), means, strict=False))}


def numbers(row: list[str]) -> bool:
    """Whether a line is whole and all of it was measured: the last one may be cut, and a card may not know its
    power."""
    return len(row) == len(FIELDS) and all(cell.strip().replace(".", "", 1).isdigit() for cell in row)
