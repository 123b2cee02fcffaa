"""How OpenMP's threads wait, and how many there are: settings that torch's library reads once, when it is loaded.

By default a thread that is done spins for a few hundred milliseconds before it sleeps. Where other processes want the cores, it spins in their place and
its own team waits for it: 300 small layers on two busy cores took 72 to 85 s, and 4 to 17 s with threads that sleep at once; with the cores to themselves
both took 1.3 to 1.6 s for 1,000.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
CGROUP = Path("/sys/fs/cgroup")


def be_a_good_neighbour(environ: MutableMapping[str, str], cgroup: Path = CGROUP) -> None:
    """Threads sleep while they wait, and are no more than the container's share of processors; what the user has set stays.

    Processes that are started later inherit it. Of no effect where torch was imported before.
    """
    if not any(name in environ for name in WAITING):
        environ["OMP_WAIT_POLICY"] = "passive"
    share = processor_share(cgroup)
    if share is not None and not any(name in environ for name in COUNTS) and math.ceil(share) < len(os.sched_getaffinity(0)):
        # OpenMP counts the processors of the machine, and a container that exceeds its share is stopped for the rest of every tenth of a second.
        environ["OMP_NUM_THREADS"] = str(max(1, math.ceil(share)))


def processor_share(cgroup: Path) -> float | None:
    """Processors that a container may keep busy, as its control group says; None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except ValueError:  # "max"
        return None
