"""What kernels take by the device's own clock, recorded and launched at once: measured as the host launches them, a
slow host is taken for a slow GPU. On an H100's host with other users one product of 0.05 ms took as long to launch, and
expansion looked a third as fast as it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from flexbatch.execution.garbage import no_collection

logger = logging.getLogger("flexbatch")

CALLS, REPEATS = 10, 5


def recorded_seconds(work: Callable[[], object], device: torch.device, sustained: float = 0.0) -> float:
    """Of one ``work`` on a GPU: the fastest of some runs of several in a row, or the mean of those in the second half
    of so many ``sustained`` seconds. What cannot be recorded is launched one by one."""
    try:
        return _recorded_seconds(work, device, sustained)
    except RuntimeError as error:
        logger.warning("not recorded, and measured as the host launches it: %s", error)
        torch.cuda.synchronize(device)
        return replayed_seconds(work, device, CALLS)


def _recorded_seconds(work: Callable[[], object], device: torch.device, sustained: float) -> float:
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
        replayed = (
            sustained_seconds(graph.replay, device, sustained) if sustained else replayed_seconds(graph.replay, device)
        )
        seconds = replayed / CALLS
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


def sustained_seconds(replay: Callable[[], object], device: torch.device, sustained: float) -> float:
    """Of one ``replay`` in the second half of so many seconds of them: a card at its power limit has lowered its clock
    by then."""
    found, began = [0.0], time.perf_counter()
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while len(found) == 1 or time.perf_counter() - began < sustained:
            begin.record()
            replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
    return second_half(found[1:])


def second_half(seconds: Sequence[float]) -> float:
    """The mean of the second half of these."""
    later = seconds[len(seconds) // 2 :]
    return sum(later) / len(later)
