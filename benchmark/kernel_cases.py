"""Cases that the kernels are checked and timed on, and the checks against the oracle."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from flexbatch.kernels import attention_reference, reference

Row = dict[str, Any]
MIB = 1 << 20
HEAD_START_CYCLES = 1_000_000
"""Half a millisecond: the host launches meanwhile. A launch takes 25 to 50 us of it, a tenth of what 64 sequences of
512 tokens take."""


def seconds(work: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
    """Median seconds of ``work`` on the current CUDA stream, as long as its launches take the host no more than the
    stream's head start."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def attention_call(
    queries: list[int],
    contexts: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    bits: int = 16,
    tree: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    pinned: bool = False,
    group: int = 64,
) -> tuple[tuple[torch.Tensor, ...], Row]:
    """Arguments of `paged_attention` over random pages of 16 tokens. group: of rows of 8 and 4 bits."""
    pages_each = -(-max(contexts) // 16)
    num_pages = pages_each * len(contexts)
    shape = (num_pages * 16, 2, kv_heads, head_dim)
    if bits == 16:
        rows = torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
        for part in rows.split(1 << 16):
            part.normal_()
    else:
        key, value = (torch.randn(shape[0], kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        rows = reference.pack_rows(key, value, bits, group)
    table = torch.randperm(num_pages, device=device).view(len(contexts), pages_each).int()
    query = torch.randn(sum(queries), heads, head_dim, dtype=dtype, device=device)
    starts, lens = (
        torch.tensor([0, *queries], device=device).cumsum(0).int(),
        torch.tensor(contexts, device=device).int(),
    )
    options: Row = {"num_kv_heads": kv_heads, "page_tokens": 16, "scale": head_dim**-0.5, "bits": bits}
    options["group"] = group
    options |= {"max_query_len": max(queries), "max_context_len": max(contexts)}
    if tree:  # chains with side branches: every token sees the even ones before it, and itself
        size, words = max(queries), -(-max(queries) // 32)
        seen = (
            torch.ones(size, words * 32).tril(-1) * (torch.arange(words * 32) % 2 == 0) + torch.eye(size, words * 32)
        ).long()
        packed = (seen.view(size, words, 32) << torch.arange(32)).sum(-1)
        packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
        options["tree_masks"] = torch.cat([packed[:n] for n in queries]).to(device)
        depths = [context - n + seen[:n].sum(-1) - 1 for n, context in zip(queries, contexts, strict=True)]
        options["positions"] = torch.cat(depths).int().to(device)
    return (query, rows, table, starts, lens), options


PREFILL = {
    "OPT-30B shape, 16 prompts of 512": ([512] * 16, [512] * 16, 56, 56, 128),
    "Llama-3-8B shape, one prompt of 8192": ([8192], [8192], 32, 8, 128),
    "Llama-3-8B shape, 8 chunks of 512 at 4096": ([512] * 8, [4096] * 8, 32, 8, 128),
    "Llama-3-8B shape, 64 ragged prompts": (
        [20 + 6 * i for i in range(64)],
        [20 + 6 * i for i in range(64)],
        32,
        8,
        128,
    ),
    "head of 80, 16 prompts of 1024": ([1024] * 16, [1024] * 16, 32, 32, 80),
}
DECODE = {
    "OPT-30B shape, 64 x 512": ([1] * 64, [512] * 64, 56, 56, 128),
    "Llama-3-8B shape, 64 x 4096": ([1] * 64, [4096] * 64, 32, 8, 128),
    "Llama-3-70B shape, 64 x 2048": ([1] * 64, [2048] * 64, 64, 8, 128),
    "Llama-3-8B shape, 8 x 16384": ([1] * 8, [16384] * 8, 32, 8, 128),
    "Llama-3-8B shape, 2 x 65536": ([1] * 2, [65536] * 2, 32, 8, 128),
}


SHAPES = (
    (16, False, 8, 2, 128),
    (16, True, 4, 4, 80),
    (8, False, 8, 1, 64),
    (4, False, 4, 2, 128),
    (4, True, 4, 4, 256),
)
"""Bits, tree, heads, KV heads, head size."""


def check_attention(device: str, dtype: torch.dtype, tolerance: float, only: int | None = None) -> list[Row]:
    from flexbatch.kernels import attention

    rows: list[Row] = []
    for number, (bits, tree, heads, kv_heads, head_dim) in enumerate(SHAPES):
        if only is not None and number != only:
            continue
        for queries, contexts, splits in (([1, 70, 3], [200, 90, 33], 1), ([1, 1, 1], [300, 7, 129], 4)):
            call, options = attention_call(
                queries, contexts, heads, kv_heads, head_dim, bits=bits, tree=tree, dtype=dtype, device=device
            )
            wanted = attention_reference.paged_attention(*call, **options).float()
            row = {
                "kernel": "attention",
                "dtype": str(dtype),
                "bits": bits,
                "tree": tree,
                "heads": f"{heads}/{kv_heads}x{head_dim}",
                "splits": splits,
            }
            print(f"checking {row}", file=sys.stderr, flush=True)
            error = (attention.paged_attention(*call, **options, splits=splits).float() - wanted).abs().max().item()
            # Heads that share quantized keys and values are weighed in bfloat16.
            allowed = max(tolerance, 3e-2) if bits != 16 and dtype == torch.float16 else tolerance
            rows.append(row | {"error": error, "ok": error < allowed})
    return rows


def check_quantization(device: str, dtype: torch.dtype) -> list[Row]:
    from flexbatch.kernels import quant

    rows: list[Row] = []
    for bits in (8, 4):
        weight = torch.randn(192, 320).to(dtype)
        codes, parameters = reference.quantize(weight, bits, 64)
        got = quant.quantize(weight.to(device), bits, 64)
        dense = quant.dequantize(codes.to(device), parameters.to(device), weight.shape[1], bits, 64).cpu()
        wanted = reference.dequantize(codes, parameters, weight.shape[1], bits, 64)
        same = [torch.equal(codes, got[0].cpu()), torch.equal(parameters, got[1].cpu()), torch.equal(dense, wanted)]
        rows.append(
            {
                "kernel": "quantization",
                "dtype": str(dtype),
                "bits": bits,
                "same codes, parameters, values": same,
                "ok": all(same),
            }
        )
    return rows


def check(device: str, only: int | None = None) -> list[Row]:
    """Largest error of every kernel against the oracle: attention within a tolerance, quantization bit for bit with
    the oracle on the CPU."""
    tolerances = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    if device == "cpu":  # Triton's interpreter has no products of bf16
        del tolerances[torch.bfloat16]
    rows: list[Row] = []
    for dtype, tolerance in tolerances.items():
        rows += check_attention(device, dtype, tolerance, only) + check_quantization(device, dtype)
    return rows
