"""Rates of the links between host and device, each way alone and both together."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from flexbatch.calibrate.fits import fit_rate

MIB = 2**20

GATHER_SHARE = 0.93
"""Page gather by kernel against the copy engine, measured elsewhere (51.4 of 55.3 GB/s on an H200)."""


class Timer:
    """The fastest of repeated runs on one device: what is above it is the machine's other users.

    On a GPU a run is as many calls in a row as take SPAN_SECONDS, or launching and waiting would be counted as work:
    15 of 47 microseconds that a GEMM of one token took on an H200.
    """

    SPAN_SECONDS = 0.004
    LEAST_RUNS, SETTLED_RUNS, SETTLED = 2, 4, 0.01
    """Runs at least; and fastest runs that are within a hundredth of each other, after which no more are needed: fits
    of links and products were off by 0 to 0.1 % on hosts that had nothing else to do."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds

    def __call__(self, work: Callable[[], object]) -> float:
        """Seconds of one ``work``: one warm-up, then at least two runs and about ``self.seconds`` at most."""
        self._once(work)
        single = self._once(work)
        several = self.device.type == "cuda"
        calls = max(1, round(self.SPAN_SECONDS / single)) if several else 1
        times: list[float] = [] if several else [single]
        deadline = time.perf_counter() + self.seconds
        while len(times) < self.LEAST_RUNS or (
            time.perf_counter() < deadline and len(times) < 50 and not self.settled(times)
        ):
            times.append(self._once(work, calls))
        return min(times)

    def settled(self, times: list[float]) -> bool:
        fastest = sorted(times)[: self.SETTLED_RUNS]
        return len(fastest) == self.SETTLED_RUNS and fastest[-1] <= (1 + self.SETTLED) * fastest[0]

    def _once(self, work: Callable[[], object], calls: int = 1) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self._wait()
        return (time.perf_counter() - start) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_links(values: dict, errors: dict[str, float], dev: torch.device, timer: Timer) -> tuple[Tensor, Tensor]:
    """Copies each way over sizes, and both at once. Returns two tensors in the host's memory."""
    largest = 256 * MIB
    pinned = dev.type == "cuda"
    host, back = (torch.empty(largest, dtype=torch.uint8, pin_memory=pinned).fill_(1) for _ in range(2))
    near, far = (torch.empty(largest, dtype=torch.uint8, device=dev).fill_(1) for _ in range(2))
    # Without a GPU a copy must not fit the processor's cache, or it says nothing about memory.
    sizes = [largest >> shift for shift in ((6, 4, 2, 0) if pinned else (3, 2, 1, 0))]
    for name, target, origin in (("h2d", near, host), ("d2h", back, far)):
        fit = fit_rate(sizes, [timer(partial(_copy, target[:n], origin[:n])) for n in sizes])
        values[name], errors[name] = fit.rate, fit.error
        if name == "h2d":
            values["link_seconds"] = fit.fixed_seconds
    values["link_both"] = 2 * largest / timer(lambda: _both(dev, (near, host), (back, far)))
    share = GATHER_SHARE if pinned else 1.0
    values["gather"], values["scatter"] = share * values["h2d"], share * values["d2h"]
    return host, back


def host_bandwidth(host: Tensor, back: Tensor, seconds: float) -> float:
    """Bytes read or written a second in the host's memory, by all cores."""
    words, timer = host.view(torch.int32), Timer(torch.device("cpu"), seconds)
    copy = 2 * host.nbytes / timer(lambda: back.copy_(host))
    return max(host.nbytes / timer(words.sum), copy)


def _copy(target: Tensor, origin: Tensor) -> None:
    target.copy_(origin, non_blocking=True)


def _both(dev: torch.device, *copies: tuple[Tensor, Tensor]) -> None:
    """All copies at once: on streams of their own, or in threads."""
    if dev.type == "cuda":
        streams = [torch.cuda.Stream(dev) for _ in copies]
        for stream, (target, origin) in zip(streams, copies, strict=True):
            with torch.cuda.stream(stream):
                target.copy_(origin, non_blocking=True)
        return
    with ThreadPoolExecutor(len(copies)) as pool:
        for done in [pool.submit(target.copy_, origin) for target, origin in copies]:
            done.result()
