"""Timings of CPU attention, alone and beside the link."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch

from benchmark.kernel_cases import MIB, Row, attention_call
from flexbatch.kernels import native


def host_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cpu_rows(sequences: int) -> list[Row]:
    """CPU attention alone, and while the copy engine carries another buffer to the GPU."""
    cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
    plain = torch.ones(256 * MIB)
    rows: list[Row] = [
        {
            "kernel": "host memory read",
            "threads": threads,
            "gbps": plain.nbytes / host_seconds(lambda: plain.sum()) / 1e9,
        }
    ]
    for heads, kv_heads, bits, dtype in (
        (56, 56, 16, torch.bfloat16),
        (32, 8, 16, torch.bfloat16),
        (64, 8, 16, torch.bfloat16),
        (56, 56, 4, torch.bfloat16),
    ):
        count = sequences * 56 // kv_heads // (1 if bits == 16 else 4)
        call, options = attention_call(
            [1] * count,
            [512] * count,
            heads,
            kv_heads,
            128,
            bits=bits,
            dtype=dtype,
            device="cpu",
            pinned=cuda and bits == 16,
        )
        num_bytes = 512 * count * call[1][0].numel() * call[1].element_size()
        attend = lambda: native.paged_attention(*call, **options, threads=threads)  # noqa: E731
        row: Row = {
            "kernel": "CPU attention",
            "heads": f"{heads}/{kv_heads}x128",
            "bits": bits,
            "threads": threads,
            "gbps": num_bytes / host_seconds(attend) / 1e9,
        }
        rows.append(row | (beside_the_link(attend, num_bytes) if cuda else {}))
    return rows


def beside_the_link(attend: Callable[[], object], num_bytes: int) -> Row:
    source, target = (
        torch.ones(512 * MIB, dtype=torch.uint8).pin_memory(),
        torch.empty(512 * MIB, dtype=torch.uint8, device="cuda"),
    )
    done, rates = threading.Event(), []

    def carry() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not done.is_set():
                start = time.perf_counter()
                for _ in range(4):
                    target.copy_(source, non_blocking=True)
                stream.synchronize()
                rates.append(4 * source.numel() / (time.perf_counter() - start) / 1e9)

    thread = threading.Thread(target=carry)
    thread.start()
    took = host_seconds(attend, 8)
    done.set()
    thread.join()
    return {"gbps_beside_link": num_bytes / took / 1e9, "link_gbps_beside": statistics.median(rates)}
