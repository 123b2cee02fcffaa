"""Rates of the engine's own kernels on this machine, for the profile that the policy optimizer plans by;
`engine_kernels` adds what its Python costs.

`measure` has links, GEMMs and disks, with torch alone; what runs in kernels of this project is measured here, by the
calls that the engine makes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from flexbatch.calibrate.compiling import small_pass_calls
from flexbatch.calibrate.experts import repeated
from flexbatch.calibrate.fits import fit_curve
from flexbatch.calibrate.replays import recorded_seconds
from flexbatch.kernels import ops, reference
from flexbatch.memory.host_memory import host_memory_bytes
from flexbatch.policy.attention_seconds import tile_keys
from flexbatch.policy.curve import Curve

GIB = 2**30
MIB = 2**20
PAGE_TOKENS, GROUP, HEAD_DIM = 16, 64, 128
QUERY_HEADS = (1, 4, 8)
"""Query heads of one key-value head: plain, and as Llama-3-8B and 70B share them."""
CONTEXT = 512
DRAWN_TOKENS = 8192
PROMPTS = 8
"""Of a pass."""


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The fastest of ``repeats`` after a warm-up, or of less where two are within a fiftieth of each other; on a GPU by
    its own clock."""
    if device.type == "cuda":
        return recorded_seconds(work, device)
    found: list[float] = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
        fastest = sorted(found[1:])[:2]
        if len(fastest) == 2 and fastest[1] <= 1.02 * fastest[0]:
            break
    return min(found[1:])


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers; large tensors repeat a million of them, drawing more takes longer than measuring."""
    count = torch.Size(shape).numel()
    pool = torch.randn(min(count, 1 << 20), device=device).to(dtype)
    return pool.repeat(-(-count // len(pool)))[:count].view(shape)


def cache_rows(num_tokens: int, kv_heads: int, dtype: torch.dtype, device: torch.device, bits: int = 16) -> Tensor:
    """Token rows of a cache. On the CPU they are in host memory of the engine's own kind, and repeat some thousands:
    drawing and quantizing all of 2 GiB in new pages took 8 s of a profile, of which 7 measured nothing."""
    drawn = min(num_tokens, DRAWN_TOKENS) if device.type == "cpu" else num_tokens
    rows = normal((drawn, 2, kv_heads, HEAD_DIM), dtype, device)
    if bits != 16:
        row_bytes = reference.token_bytes(kv_heads, HEAD_DIM, bits, GROUP, dtype.itemsize)
        packed = torch.zeros(drawn, row_bytes, dtype=torch.uint8, device=device)
        slots = torch.arange(drawn, device=device)
        ops.append_rows(packed, slots, rows[:, 0].contiguous(), rows[:, 1].contiguous(), bits, GROUP)
        rows = packed
    return repeated(rows, num_tokens) if device.type == "cpu" else rows


def attention_call(
    rows: Tensor,
    query_tokens: int,
    context: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    bits: int = 16,
) -> Callable[[], Tensor]:
    """A call of `ops.paged_attention` over `cache_rows`, its pages in random order. ``heads``: query heads, key-value
    heads."""
    num_heads, kv_heads = heads
    pages_each, num_sequences, device = context // PAGE_TOKENS, len(rows) // context, rows.device
    table = torch.randperm(num_sequences * pages_each).view(num_sequences, pages_each).int().to(device)
    query = normal((num_sequences * query_tokens, num_heads, HEAD_DIM), dtype, device)
    starts = torch.arange(0, num_sequences * query_tokens + 1, query_tokens, dtype=torch.int32, device=device)
    lens = torch.full((num_sequences,), context, dtype=torch.int32, device=device)

    def call() -> Tensor:
        return ops.paged_attention(
            query,
            rows,
            table,
            starts,
            lens,
            num_kv_heads=kv_heads,
            page_tokens=PAGE_TOKENS,
            scale=HEAD_DIM**-0.5,
            bits=bits,
            group=GROUP,
            max_query_len=query_tokens,
            max_context_len=context,
        )

    return call


def calls_of_a_profile(device: torch.device, dtype: torch.dtype) -> list[Callable[[], object]]:
    """One of every kernel of a GPU that is measured below, on small sizes."""

    def attend(heads: int, sequences: int, query_tokens: int, context: int, bits: int = 16) -> Callable[[], object]:
        def call() -> None:
            rows = cache_rows(sequences * context, heads, dtype, device, bits)
            attention_call(rows, query_tokens, context, (heads, heads), dtype, bits)()

        return call

    return [
        attend(32, 128, 1, CONTEXT),
        attend(32, 128, 1, CONTEXT, bits=4),
        attend(32, 8, CONTEXT, CONTEXT),
        attend(32, 8, CONTEXT // 4, CONTEXT // 4),
        *(attend(32, PROMPTS, CONTEXT, CONTEXT, bits) for bits in (8, 4)),
        attend(1, 8, 1, PAGE_TOKENS),
        attend(1, 512, 1, PAGE_TOKENS),
        attend(1, 8, 4, PAGE_TOKENS),
        lambda: [call() for _, call in page_calls(device, 4, 256).values()],
        *small_pass_calls(device),
    ]


def attention_rates(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the rates of the compute device: single query tokens over 16-bit and quantized rows, and prompts."""
    gpu = device.type == "cuda"
    sequences, heads = (128, (32, 32)) if gpu else (16, (8, 8))
    rows = cache_rows(sequences * CONTEXT, heads[1], dtype, device)
    size = rows.numel() * rows.element_size()
    rates = {"attention_decode": size / seconds(attention_call(rows, 1, CONTEXT, heads, dtype), device)}
    if gpu:
        from flexbatch.kernels import attention

        rates["attention_tile_keys"] = float(attention.choose_launch(dtype, HEAD_DIM, 16, 1).block_n)
    packed = cache_rows(sequences * CONTEXT, heads[1], dtype, device, bits=4)
    call = attention_call(packed, 1, CONTEXT, heads, dtype, bits=4)
    rates["attention_expand"] = size / seconds(call, device)
    if gpu:
        return rates | prompt_rates(device, dtype)
    call = attention_call(rows[:CONTEXT], CONTEXT, CONTEXT, heads, dtype)
    return rates | {"attention_prefill": prompt_flops(1, CONTEXT) * heads[0] / seconds(call, device)}


def prompt_flops(prompts: int, length: int) -> float:
    """Of attention, a head."""
    return 4.0 * prompts * HEAD_DIM * length * (length + 1) / 2


def prompt_rates(device: torch.device, dtype: torch.dtype, heads: int = 32) -> dict[str, float]:
    """Of prompts on a GPU, by short and long ones: the rate of their products, that of expanding codes beside them, and
    what a launch takes besides. Over codes of 4 bits the pieces of jobs on an H200 took 0.06 to 0.25 ms a layer more
    than a multiple of what single tokens take; prompts over codes had never been timed alone."""
    lengths = CONTEXT // 4, CONTEXT

    def timed(bits: int) -> list[float]:
        found = []
        for length in lengths:
            rows = cache_rows(PROMPTS * length, heads, dtype, device, bits)
            found.append(seconds(attention_call(rows, length, length, (heads, heads), dtype, bits), device))
        return found

    products = [heads * prompt_flops(PROMPTS, length) for length in lengths]
    rate, start = line(products, timed(16))
    rates = {"attention_prefill": rate, "prompt_start_seconds": start}
    row_bytes = 2 * heads * HEAD_DIM * dtype.itemsize
    loaded = [row_bytes * PROMPTS * float(tile_keys(length * (length + 1) / 2, length)) for length in lengths]
    for bits in (8, 4):
        # Where products would have taken all of it, next to nothing is left for expanding.
        beside = [max(took - done / rate, took / 100) for took, done in zip(timed(bits), products, strict=True)]
        rates[f"prompt_expand_{bits}"], rates[f"prompt_expand_{bits}_start_seconds"] = line(loaded, beside)
    return rates


def line(amounts: Sequence[float], took: Sequence[float]) -> tuple[float, float]:
    """(rate, seconds of nothing) through two points, the second of more; where more takes no longer, the rate of
    it."""
    slope = (took[1] - took[0]) / (amounts[1] - amounts[0])
    if slope <= 0:
        return amounts[1] / took[1], 0.0
    start = took[0] - slope * amounts[0]
    return (1 / slope, start) if start >= 0 else (amounts[1] / took[1], 0.0)


def page_calls(
    device: torch.device, num_pages: int = 1024, width: int = 8192
) -> dict[str, tuple[int, Callable[[], object]]]:
    """Gather and scatter between pinned host pages and the GPU, and the dequantization of weights: bytes, and a call
    that moves them."""
    page_bytes = 256 * 1024
    host = torch.empty(num_pages, page_bytes, dtype=torch.uint8, pin_memory=True).fill_(1)
    ids = torch.randperm(len(host), device=device)[: len(host) // 2]
    narrow = ids.int()
    staging = torch.empty(len(ids), page_bytes, dtype=torch.uint8, device=device)
    weight = normal((width, width), torch.bfloat16, device)
    codes, parameters = ops.quantize(weight, 4, GROUP)
    dense = torch.empty_like(weight)
    moved = sum(x.nbytes for x in (weight, codes, parameters))
    return {
        "gather": (staging.nbytes, lambda: ops.gather_pages(host, narrow, staging)),
        "scatter": (staging.nbytes, lambda: ops.scatter_rows(staging, host, ids)),
        "expand": (moved, lambda: ops.dequantize(codes, parameters, weight.shape[1], 4, GROUP, out=dense)),
    }


def page_rates(device: torch.device) -> dict[str, float]:
    return {name: moved / seconds(call, device) for name, (moved, call) in page_calls(device).items()}


def cpu_attention_rates(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Alone, for more and more query heads of a key-value head, and without a GPU beside copies; with one `host_rates`
    measures that in passes.

    The cache is larger than any processor's own caches: a part of 134 MB was found there on a 16-core machine, and
    309 GB/s measured; with 1 GiB still 159 GB/s, where engines with 9 GiB saw 120.
    """
    host = torch.device("cpu")
    size = min(2 * GIB, host_memory_bytes() // 8) if device.type == "cuda" else 128 * MIB
    kv_heads = 8
    sequences = size // (CONTEXT * 2 * kv_heads * HEAD_DIM * dtype.itemsize)

    def curve_of(bits: int) -> Curve:
        # What is quantized takes the memory of both while it is made.
        rows = cache_rows((sequences if bits == 16 else sequences // 2) * CONTEXT, kv_heads, dtype, host, bits)
        # As if the rows had 16 bits: an engine counts tokens.
        num_bytes = len(rows) * 2 * kv_heads * HEAD_DIM * dtype.itemsize
        calls = (attention_call(rows, 1, CONTEXT, (heads * kv_heads, kv_heads), dtype, bits) for heads in QUERY_HEADS)
        rates = [num_bytes / seconds(call, host, 4) for call in calls]
        # More query heads do not read the cache faster: the regression runs from the most to one.
        falling, _ = fit_curve(QUERY_HEADS, rates[::-1])
        return Curve(falling.points, falling.values[::-1])

    rates: dict[str, Any] = {
        "cpu_attention": curve_of(16),
        "cpu_attention_8": curve_of(8),
        "cpu_attention_4": curve_of(4),
    }
    if device.type == "cpu":
        rows = cache_rows(sequences * CONTEXT, kv_heads, dtype, host)
        call = attention_call(rows, 1, CONTEXT, (kv_heads, kv_heads), dtype)
        attention, link = beside(call, rows.numel() * rows.element_size())
        rates |= {"cpu_attention_during_h2d": attention, "h2d_during_cpu_attention": link}
    return rates


def beside(attend: Callable[[], object], num_bytes: int, rounds: int = 10) -> tuple[float, float]:
    """(bytes a second attended, bytes a second copied) while both run in host memory."""
    source = torch.empty(32 * MIB, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    stop = threading.Event()

    def carry() -> float:
        copied, start = 0, time.perf_counter()
        while not stop.is_set() or not copied:
            target.copy_(source)
            copied += source.numel()
        return copied / (time.perf_counter() - start)

    with ThreadPoolExecutor(1) as pool:
        link = pool.submit(carry)
        start = time.perf_counter()
        try:
            for _ in range(rounds):
                attend()
            took = time.perf_counter() - start
        finally:
            stop.set()
        return rounds * num_bytes / took, link.result()
