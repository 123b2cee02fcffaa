"""Measures this machine for the policy optimizer: links, compute, host, disk, and the engine's kernels and Python.

What computes on the device's own clock or waits for a link is measured while kernels are compiled; what needs the
host's cores afterwards, each part alone. Pinned and plain buffers stay below 2 GiB together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flexbatch.calibrate.disk import measure_disk
from flexbatch.calibrate.fits import fit_curve, mean_rate
from flexbatch.calibrate.identity import machine_key
from flexbatch.calibrate.links import GATHER_SHARE, MIB, Timer, host_bandwidth, measure_links
from flexbatch.calibrate.phases import Phases
from flexbatch.calibrate.replays import recorded_seconds
from flexbatch.execution.garbage import frozen_heap
from flexbatch.policy.hardware import Hardware
from flexbatch.policy.launches import KERNELS_OF_TICK

logger = logging.getLogger("flexbatch")

TOKENS = {"cuda": (1, 16, 48, 128, 256, 512, 1024, 2048, 4096), "cpu": (1, 4, 16, 64, 256, 512)}
GROUPS = (1, 4, 8)
SUSTAINED_FROM, FIRST_SUSTAINED, SUSTAINED = 512, 0.5, 0.15
"""Tokens from which on products keep a GPU at its power limit, and for how many seconds they do before and while they
are measured, the most tokens first. Of 0.04 s an H200 gave 789 TFLOP/s; jobs whose passes are products got 690 to 700,
and so does the card for a second of them at 700 W: passes of StarCoder, Falcon-7B and Llama-3-8B with prompts were
planned 15 to 20 % too short. Compilers are waited for longer than this takes."""

Request = tuple[int, float]
"""Bytes and seconds."""
DiskTimes = tuple[list[Request], list[Request], float]
"""What `measure_disk` gives."""


class EngineRates(Protocol):
    """Measures what runs in the engine's own kernels: `kernels.EngineKernels`."""

    def compiled(self, phases: Phases) -> AbstractContextManager[None]:
        """Its kernels are, at the end of the body."""

    def rates(self, phases: Phases) -> dict[str, Any]:
        """Fields of `Hardware`."""


def begin_disk(device: str, folder: Path) -> Future[DiskTimes] | None:
    """Measure the disk beside what follows on a machine with a GPU, of whose links and cores it takes a fiftieth. None:
    a CPU does either by itself."""
    if torch.device(device).type != "cuda":
        return None
    pool = ThreadPoolExecutor(1, thread_name_prefix="flexbatch-profile")
    disk = pool.submit(measure_disk, folder, 1024 * MIB, 4.0)
    pool.shutdown(wait=False)
    return disk


def measure(
    device: str, disk_folder: Path, engine: EngineRates | None = None, phases: Phases | None = None
) -> Hardware:
    """Measure everything that the cost model uses. engine: None where library kernels and stated ratios are to stand
    in for the engine's own, and the JSON's ``source`` says so.

    Takes less than 20 seconds with a GPU, 3 of them compiling, and as long without (docs/architecture.md has the
    parts). Raises OSError when the disk folder cannot be written.
    """
    phases = phases or Phases()
    dev = torch.empty(0, device=device).device  # with its number
    gpu = dev.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    timer = Timer(dev, 0.1 if gpu else 0.12)
    values: dict = {}
    errors: dict[str, float] = {}
    disk, given = begin_disk(device, disk_folder), dict[str, Any]()
    compiled = engine.compiled(phases) if engine is not None else contextlib.nullcontext()
    with frozen_heap(), torch.no_grad():  # as jobs run
        with compiled, phases.of("links and products"):
            host = measure_links(values, errors, dev, timer)
            weight = _products(values, errors, dev, dtype, timer)
        with phases.of("the host's memory"):
            values["host_bandwidth"] = host_bandwidth(*host, timer.seconds)
        del host
        if engine is None:
            with phases.of("stand-ins for kernels"):
                _attention(values, dev, dtype, timer)
                _expansion(values, weight, timer)
                _cpu_attention(values, errors, dev, dtype, timer)
                _overheads(values, dev, timer)
        else:
            if not gpu:
                _expansion(values, weight, timer)
            del weight
            given = engine.rates(phases)
    with phases.of("the disk"):
        times = measure_disk(disk_folder, 128 * MIB, seconds=4.0) if disk is None else disk.result()
    _note_disk(values, errors, *times)
    values |= capacities(dev, disk_folder)
    return _hardware(values, given, errors, dev, machine_key(dev, disk_folder)[0], phases)


def _hardware(
    values: dict, given: dict[str, Any], errors: dict[str, float], dev: torch.device, machine: str, phases: Phases
) -> Hardware:
    """given: fields that the engine's own kernels were measured for; they come before ``values``."""
    source = {"measured": f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}", "machine": machine}
    source["load average"] = (
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    )
    if dev.type == "cuda":
        stand_ins = {
            "gather": f"{GATHER_SHARE} of h2d",
            "scatter": f"{GATHER_SHARE} of d2h",
            "expand": "a PyTorch expression, not a fused kernel",
        }
        source |= {name: text for name, text in stand_ins.items() if name not in given}
    source |= dict.fromkeys(given, "the engine's own kernel")
    source["took"] = phases.text
    if {"cpu_attention_during_h2d", "h2d_during_cpu_attention"} <= given.keys():
        given["h2d_during_cpu_attention"] = min(given["h2d_during_cpu_attention"], values["h2d"])
        values["host_bandwidth"] = max(
            values["host_bandwidth"], given["cpu_attention_during_h2d"] + given["h2d_during_cpu_attention"]
        )
    return Hardware(**{"name": machine, "device": dev.type, **values, **given, "fit_error": errors, "source": source})


def _products(values: dict, errors: dict[str, float], dev: torch.device, dtype: torch.dtype, timer: Timer) -> Tensor:
    """GEMM against tokens, and memory bandwidth. Returns the weight."""
    gpu = dev.type == "cuda"
    rows, columns = (8192, 8192) if gpu else (2048, 2048)
    weight = torch.randn(rows, columns, device=dev, dtype=dtype)
    rates, sustained = [], FIRST_SUSTAINED
    for tokens in reversed(TOKENS[dev.type]):
        x = torch.randn(tokens, columns, device=dev, dtype=dtype)
        product = partial(torch.nn.functional.linear, x, weight)
        sustained = sustained if tokens >= SUSTAINED_FROM else 0.0
        seconds = recorded_seconds(product, dev, sustained) if gpu else timer(product)
        rates.append(2 * tokens * rows * columns / seconds)
        sustained = SUSTAINED
    values["gemm"], errors["gemm"] = fit_curve(TOKENS[dev.type], rates[::-1])
    source, target = (torch.empty((512 if gpu else 64) * MIB, dtype=torch.uint8, device=dev).fill_(1) for _ in range(2))
    values["gpu_bandwidth"] = 2 * source.numel() / timer(lambda: target.copy_(source))
    return weight


def _attention(values: dict, dev: torch.device, dtype: torch.dtype, timer: Timer) -> None:
    """Of the library, for single tokens and for prompts."""
    batch, heads, head_dim, context = (64, 32, 128, 1024) if dev.type == "cuda" else (16, 8, 64, 1024)
    cache = torch.randn(2, batch, heads, context, head_dim, device=dev, dtype=dtype)
    single = torch.randn(batch, heads, 1, head_dim, device=dev, dtype=dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    values["attention_decode"] = (
        cache.numel() * cache.element_size() / timer(lambda: attend(single, cache[0], cache[1]))
    )
    few = cache[:, : max(1, batch // 16)]
    flops = 4 * few.shape[1] * heads * head_dim * context * (context + 1) / 2
    values["attention_prefill"] = flops / timer(lambda: attend(few[0], few[0], few[1], is_causal=True))


def _expansion(values: dict, weight: Tensor, timer: Timer) -> None:
    """Dequantization of weights, of which this one has the size."""
    codes = torch.randint(0, 255, (weight.numel() // 64, 64), device=weight.device, dtype=torch.uint8)
    scale = torch.rand(codes.shape[0], 1, device=weight.device, dtype=weight.dtype)
    moved = codes.numel() * (1 + weight.element_size())
    values["expand"] = moved / timer(lambda: codes.to(weight.dtype).mul_(scale).add_(scale))


def _cpu_attention(values: dict, errors: dict[str, float], dev: torch.device, dtype: torch.dtype, timer: Timer) -> None:
    """Grouped heads folded into the query length, alone and while copies to the GPU run."""
    # Larger than any processor's own caches: of 134 MB a part was found there on a 16-core machine, and 309 GB/s
    # measured.
    batch, kv_heads, head_dim, context = (256, 8, 128, 1024) if dev.type == "cuda" else (16, 8, 64, 1024)
    cache = torch.randn(2, batch, kv_heads, context, head_dim, dtype=dtype)
    size = cache.numel() * cache.element_size()

    def attend(group: int) -> Callable[[], Tensor]:
        query = torch.randn(batch, kv_heads, group, head_dim, dtype=dtype)
        return lambda: torch.nn.functional.scaled_dot_product_attention(query, cache[0], cache[1])

    host_timer = Timer(torch.device("cpu"), timer.seconds)
    alone = [size / host_timer(attend(group)) for group in GROUPS]
    # A larger group reads the cache no faster: the regression runs from the largest group down.
    falling, errors["cpu_attention"] = fit_curve(GROUPS, alone[::-1])
    values["cpu_attention"] = dataclasses.replace(falling, values=falling.values[::-1])
    attention, link = beside_copies(dev, attend(1), size, 8 * timer.seconds)
    # A machine that slows down one of two by chance must not report a speed-up.
    values["cpu_attention_during_h2d"] = min(attention, values["cpu_attention"].values[0])
    values["h2d_during_cpu_attention"] = min(link, values["h2d"])
    values["host_bandwidth"] = max(values["host_bandwidth"], attention + link)


def beside_copies(dev: torch.device, attend: Callable[[], object], size: int, seconds: float) -> tuple[float, float]:
    """(bytes a second attended, bytes a second copied) while both run."""
    chunk = 64 * MIB
    host = torch.empty(chunk, dtype=torch.uint8, pin_memory=dev.type == "cuda").fill_(1)
    near = torch.empty(chunk, dtype=torch.uint8, device=dev)
    stop = threading.Event()

    def copy() -> float:
        start, copied = time.perf_counter(), 0
        while not stop.is_set() or not copied:
            if dev.type == "cuda":
                # Asleep while the copy engine works: spinning takes a core from the attention's threads, whose barriers
                # wait for the slowest.
                for _ in range(8):
                    near.copy_(host, non_blocking=True)
                done = torch.cuda.Event()
                done.record(torch.cuda.current_stream(dev))  # a thread's own device is the first one
                while not done.query():
                    time.sleep(0.0005)
                copied += 8 * chunk
            else:
                near.copy_(host)
                copied += chunk
        return copied / (time.perf_counter() - start)

    with ThreadPoolExecutor(1) as pool:
        link = pool.submit(copy)
        start, rounds = time.perf_counter(), 0
        try:
            while rounds < 3 or time.perf_counter() - start < seconds:
                attend()
                rounds += 1
        finally:
            stop.set()
        return rounds * size / (time.perf_counter() - start), link.result()


def _overheads(values: dict, dev: torch.device, timer: Timer) -> None:
    """Launching the kernels of a tick without waiting for them, and choosing the next tokens of a pass."""
    small = torch.ones(64, device=dev)
    timer(lambda: small.add_(1))
    start = time.perf_counter()
    for _ in range(10 * KERNELS_OF_TICK):
        small.add_(1)
    values["launch_seconds"] = (time.perf_counter() - start) / 10
    logits = torch.randn(64, 32000, device=dev)
    values["pass_seconds"] = timer(lambda: logits.argmax(dim=-1).tolist())


def _note_disk(
    values: dict, errors: dict[str, float], reads: list[Request], writes: list[Request], latency: float
) -> None:
    for name, results in (("disk_read", reads), ("disk_write", writes)):
        blocks, seconds = zip(*results, strict=True)
        values[name], error = mean_rate(blocks, seconds)
        if len(blocks) > 1:
            errors[name] = error
    values["disk_read_seconds"] = latency


def capacities(dev: torch.device, disk_folder: Path) -> dict[str, int]:
    """What is there and free now; without a GPU, two thirds of the free memory are the compute device's tier and the
    rest is the host's."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    disk = int(0.9 * shutil.disk_usage(disk_folder).free)
    if dev.type == "cuda":
        free, total = torch.cuda.mem_get_info(dev)
        context = min(total - free, 2 * 2**30)
        return {
            "gpu_memory_bytes": total,
            "gpu_reserved_bytes": context,
            "cpu_memory_bytes": int(0.95 * available),
            "cpu_reserved_bytes": 4 * 2**30,
            "disk_bytes": disk,
        }
    return {"gpu_memory_bytes": available * 2 // 3, "cpu_memory_bytes": available // 4, "disk_bytes": disk}
