"""What torch's allocator of a GPU did in a part of a test, and which lines asked for it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ALLOCATED = "allocated_bytes.all.current"
COUNTERS = ("num_device_alloc", "num_device_free", "reserved_bytes.all.current", ALLOCATED)
FRAMES = 5
"""Of Python that are told of each."""
MOST_LINES = 20


@dataclass
class Watched:
    """What was different after it."""

    changes: dict[str, int] = field(default_factory=dict)
    """By how much, of the counters that changed."""
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left_out = len(self.lines) - MOST_LINES
        more = [f"and {left_out} more"] if left_out > 0 else []
        return "\n  ".join([f"changed: {self.changes or 'nothing'}", *self.lines[:MOST_LINES], *more])


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Nothing goes in the body that somebody else holds, be it in a circle."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    """What earlier tests left to the collector goes before."""
    found, history = Watched(), torch.cuda.memory._record_memory_history
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    history(stacks="python")
    try:
        yield found
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
        entries = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        history(enabled=None)
    found.changes = {name: after[name] - before[name] for name in COUNTERS if after[name] != before[name]}
    found.lines = what_changed(entries)


def what_changed(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of a trace: what was asked of the driver and given back to it, allocations that stayed, and those from before
    that went."""
    lines, stayed = [], dict[int, Mapping[str, Any]]()
    for entry in entries:
        if entry["action"].startswith("segment") or entry["action"] == "oom":
            lines.append(line_of(entry["action"], entry))
        elif entry["action"] == "alloc":
            stayed[entry["addr"]] = entry
        elif entry["action"] == "free_requested" and stayed.pop(entry["addr"], None) is None:
            lines.append(line_of("freed, and from before", entry))
    return lines + [line_of("allocated, and stayed", entry) for entry in stayed.values()]


def line_of(what: str, entry: Mapping[str, Any]) -> str:
    """The innermost frames that are not torch's; the memory of a tensor that nobody holds goes in any line."""
    frames = [each for each in entry.get("frames", ()) if each["filename"].endswith(".py")]
    own = [each for each in frames if "site-packages" not in each["filename"]] or frames
    where = " < ".join(f"{Path(each['filename']).name}:{each['line']} {each['name']}" for each in own[:FRAMES])
    return f"{what}: {entry['size']} bytes on stream {entry.get('stream', 0):#x}: {where}"
