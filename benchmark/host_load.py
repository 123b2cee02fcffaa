"""What else a host did while something was measured: jobs on other GPUs of it make launching up to 1.7 times as long,
and nothing in a pass's own times says why."""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
IDLE = (3, 4)
"""Of the numbers of a line: idle, and idle while the disk is waited for."""
STOLEN = 7
"""Cores that the machine below gave to others."""


def busy_seconds() -> tuple[float, float]:
    """(of all cores, of those stolen) since the machine started; zeros where the system does not say."""
    try:
        numbers = [int(number) for number in STAT.read_text().partition("\n")[0].split()[1:9]]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0, 0.0
    busy = sum(number for index, number in enumerate(numbers) if index not in IDLE)
    return busy / ticks, numbers[STOLEN] / ticks


def own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class HostLoad:
    """From its making to `report`."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.perf_counter(), busy_seconds(), own_seconds()

    def report(self) -> dict[str, float]:
        """Cores, on average: busy for this process, for others of the machine, and stolen from it."""
        seconds = max(1e-9, time.perf_counter() - self.began)
        (busy, stolen), own = busy_seconds(), own_seconds() - self.own
        taken = stolen - self.busy[1]
        others = max(0.0, busy - self.busy[0] - taken - own)
        return {
            "cores": float(os.cpu_count() or 0),
            "own_cores": round(own / seconds, 2),
            "other_cores": round(others / seconds, 2),
            "stolen_cores": round(taken / seconds, 2),
        }
