"""What kernels take by the device's own clock, recorded and launched at once: measured as the host launches them, a
slow host is taken for a slow GPU. On an H100's host with other users one product of 0.05 ms took as long to launch, and
expansion looked a third as fast as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from flexbatch.execution.graphs import no_collection

logger = logging.getLogger("flexbatch")

CALLS, REPEATS = 10, 5


def recorded_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one ``work`` on a GPU: the fastest of some runs of several in a row. What cannot be recorded is launched one
    by one."""
    try:
        return _recorded_seconds(work, device)
    except RuntimeError as error:
        logger.warning("not recorded, and measured as the host launches it: %s", error)
        torch.cuda.synchronize(device)
        return replayed_seconds(work, device, CALLS)


def _recorded_seconds(work: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with no_collection(), torch.cuda.stream(stream):
            work()  # compiles, and chooses its kernels
            stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for _ in range(CALLS):
                    work()
            finally:
                graph.capture_end()
        seconds = replayed_seconds(graph.replay, device) / CALLS
        graph.reset()
    return seconds


def replayed_seconds(replay: Callable[[], object], device: torch.device, replays: int = 1) -> float:
    """Of one ``replay`` of a graph: the fastest of some runs of so many in a row."""
    found = []
    with torch.cuda.device(device):
        for _ in range(1 + REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(replays):
                replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3 / replays)
    return min(found[1:])
