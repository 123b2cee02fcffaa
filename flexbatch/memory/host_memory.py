"""How much host memory there is. Free of torch, so that commands can ask before they load it."""

from __future__ import annotations

import os
from pathlib import Path


def host_memory_bytes() -> int:
    """Bytes of host memory that can be had without swapping (MemAvailable); half of all memory where the system does
    not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
