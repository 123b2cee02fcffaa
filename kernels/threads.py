"""How OpenMP's threads wait, and how many there are: settings that torch's library reads once, when it is loaded.

By default a thread of GNU's OpenMP that is done spins through 300,000 iterations before it sleeps. Where other
processes want the cores, it spins instead of them and its own team waits for it. A thread that sleeps at once has to be
woken for every small layer instead. Between the two lies what is set here. The demo model, 64 passes on two cores,
median of seven:

====================  ============  =========================
spinning              idle machine  two other busy processes
====================  ============  =========================
300,000 iterations    0.55, 0.63 s  2.8, 3.1 s, once 25 s
20,000 iterations     0.52, 0.68 s  1.5, 1.9 s
none (passive)        0.78, 0.83 s  1.4, 1.9 s
====================  ============  =========================
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SHORT_WAIT = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
"""The spin limit for GNU's OpenMP (iterations, about 0.1 ms) and for Intel's and LLVM's (milliseconds)."""
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
CGROUP = Path("/sys/fs/cgroup")


def be_a_good_neighbor(environ: MutableMapping[str, str], cgroup: Path = CGROUP) -> None:
    """Threads sleep soon while they wait, and are no more than the container's share of processors; what the user has
    set stays.

    Processes that are started later inherit it. Of no effect where torch was imported before.
    """
    if not any(name in environ for name in WAITING):
        environ.update(SHORT_WAIT)
    usable = usable_processors(cgroup)
    if usable < len(os.sched_getaffinity(0)) and not any(name in environ for name in COUNTS):
        # OpenMP counts the processors that the process may run on.
        environ["OMP_NUM_THREADS"] = str(usable)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one in the body: where there is nothing to share out each meeting of two threads costs a time
    slice on a busy machine, and sums in another order may draw another token."""
    import torch  # after `be_a_good_neighbor`, which its import would forestall

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def usable_processors(cgroup: Path = CGROUP) -> int:
    """That this process may run on, and its container keep busy: one that exceeds its share is stopped for the rest of
    every tenth of a second. Whatever starts threads or processes to compute starts no more; `os.cpu_count` counts those
    of the machine, other processes' and containers' among them."""
    share, near = processor_share(cgroup), len(os.sched_getaffinity(0))
    return near if share is None else max(1, min(near, math.ceil(share)))


def processor_share(cgroup: Path) -> float | None:
    """Processors that a container may keep busy, as its control group says; None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        except OSError:
            return None
    try:
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except ValueError:  # "max"
        return None
