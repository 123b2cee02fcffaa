"""How much host memory there is. Free of torch, so that commands can ask before they load it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")
"""What the kernel gives up before it ends a process of a group: files that are read again if need be. Not "cache" or
"file", which count shared memory, too."""


def host_memory_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Bytes of host memory that can be had without swapping: what the system says (MemAvailable; half of all memory
    where it does not), and in a container or a batch system's job no more than its limit leaves. Above that limit the
    kernel ends the process, however much the machine has."""
    return min([_available_bytes(proc), *_left_in_groups(proc, cgroup)])


def _available_bytes(proc: Path) -> int:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _left_in_groups(proc: Path, cgroup: Path) -> Iterator[int]:
    """Of every control group with a memory limit that this process is in: its own, and those around it. Both versions
    of control groups: cgroup(7), "memory" of version 1 and the unified hierarchy."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroup, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root, names = cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # Inside a container the path can be that of the host, of which only the root is there.
        inner = Path(path.lstrip("/"))
        for folder in [root / inner, *(root / parent for parent in inner.parents)]:
            if (left := _left_in(folder, *names)) is not None:
                yield left


def _left_in(folder: Path, limit_file: str, used_file: str, prefix: str) -> int | None:
    """Bytes below the limit of one group, with what it can reclaim; None without a limit."""
    try:
        limit = int((folder / limit_file).read_text())
        used = int((folder / used_file).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    reclaimable = sum(int(counts.get(prefix + name, 0)) for name in RECLAIMABLE)
    return max(0, limit - max(0, used - reclaimable))
