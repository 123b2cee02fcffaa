"""Timings of the GPU kernels, each as a share of the ceiling that it should reach."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmark.kernel_cases import DECODE, MIB, PREFILL, Row, attention_call, seconds
from flexbatch.kernels import ops, reference
from flexbatch.kernels.coded_matrix import CodedMatrix


def ceilings() -> Row:
    """TFLOP/s of a GEMM, GB/s of device copy (read + written), copy engine both ways, host memory read."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(2048 * MIB, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(big)
    host = torch.ones(1024 * MIB, dtype=torch.uint8).pin_memory()
    near = big[: host.numel()]
    result = {
        "gemm_tflops": 2 * 8192**3 / seconds(lambda: a @ b) / 1e12,
        "copy_gbps": 2 * big.numel() / seconds(lambda: copy.copy_(big)) / 1e9,
        "h2d_gbps": host.numel() / seconds(lambda: near.copy_(host, non_blocking=True), 5, 1) / 1e9,
        "d2h_gbps": host.numel() / seconds(lambda: host.copy_(near, non_blocking=True), 5, 1) / 1e9,
    }
    return result


def attention_flops(queries: list[int], contexts: list[int], heads: int, head_dim: int) -> float:
    return sum(
        4.0 * heads * head_dim * q * (context - (q - 1) / 2) for q, context in zip(queries, contexts, strict=True)
    )


def attention_rows(ceiling: Row) -> list[Row]:
    from flexbatch.kernels import attention

    rows = []
    for name, (queries, contexts, heads, kv_heads, head_dim) in PREFILL.items():
        call, options = attention_call(queries, contexts, heads, kv_heads, head_dim)
        rate = (
            attention_flops(queries, contexts, heads, head_dim)
            / seconds(lambda: attention.paged_attention(*call, **options))
            / 1e12
        )
        rows.append({"kernel": "prefill", "case": name, "tflops": rate, "share": rate / ceiling["gemm_tflops"]})
    for name, (queries, contexts, heads, kv_heads, head_dim) in DECODE.items():
        for bits, size, tree in ((16, 1, False), (8, 1, False), (4, 1, False), (16, 16, True)):
            call, options = attention_call(
                [size] * len(queries), contexts, heads, kv_heads, head_dim, bits=bits, tree=tree
            )
            num_bytes = sum(contexts) * call[1][0].numel() * call[1].element_size()
            rate = num_bytes / seconds(lambda: attention.paged_attention(*call, **options)) / 1e9
            rows.append(
                {
                    "kernel": "tree of 16" if tree else "decode",
                    "case": name,
                    "bits": bits,
                    "gbps": rate,
                    "share": rate / ceiling["copy_gbps"],
                }
            )
            del call
    mixed = ([1] * 96 + [512] * 4, [600] * 96 + [512] * 4)
    call, options = attention_call(*mixed, 56, 56, 128)
    rows.append(
        {
            "kernel": "mixed pass",
            "case": "96 tokens at 600, 4 chunks of 512",
            "ms": seconds(lambda: attention.paged_attention(*call, **options)) * 1e3,
        }
    )
    return rows


def page_rows(ceiling: Row) -> list[Row]:
    from flexbatch.kernels import pages

    rows: list[Row] = []
    host = torch.ones(1024 * MIB, dtype=torch.uint8).pin_memory()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    alone = seconds(lambda: a @ b)
    for page_bytes in (4096, 65536, 448 * 1024):
        source = host[: host.numel() // page_bytes * page_bytes].view(-1, page_bytes)
        ids = torch.randperm(source.shape[0], device="cuda")[: source.shape[0] // 2]
        staging = torch.empty(len(ids), page_bytes, dtype=torch.uint8, device="cuda")
        for programs in (16, 32, 64):
            gather = seconds(lambda: pages.gather_pages(source, ids.int(), staging, num_programs=programs), 5, 1)
            scatter = seconds(lambda: pages.scatter_rows(staging, source, ids, num_programs=programs), 5, 1)
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(6):
                    pages.gather_pages(source, ids.int(), staging, num_programs=programs)
            beside = seconds(lambda: a @ b, 10, 2)
            still_running = not side.query()
            torch.cuda.synchronize()
            row: Row = {
                "kernel": "pages",
                "page_bytes": page_bytes,
                "programs": programs,
                "gather_gbps": staging.numel() / gather / 1e9,
            }
            row |= {
                "scatter_gbps": staging.numel() / scatter / 1e9,
                "gemm_slowdown": beside / alone - 1,
                "gather_outlasted_gemms": still_running,
            }
            row |= {
                "gather_share": row["gather_gbps"] / ceiling["h2d_gbps"],
                "scatter_share": row["scatter_gbps"] / ceiling["d2h_gbps"],
            }
            rows.append(row)
    return rows


def quant_rows(ceiling: Row) -> list[Row]:
    from flexbatch.kernels import quant

    rows: list[Row] = []
    weight = torch.randn(28672, 8192, device="cuda", dtype=torch.bfloat16)
    dense = torch.empty_like(weight)
    for bits in (8, 4):
        codes, parameters = quant.quantize(weight, bits, 64)
        moved = weight.nbytes + codes.nbytes + parameters.nbytes
        for name, work in (
            ("quantize", lambda: quant.quantize(weight, bits, 64)),
            ("dequantize", lambda: quant.dequantize(codes, parameters, weight.shape[1], bits, 64, out=dense)),
        ):
            rate = moved / seconds(work) / 1e9
            rows.append({"kernel": name, "bits": bits, "gbps": rate, "share": rate / ceiling["copy_gbps"]})
        rows += few_tokens_rows(weight, CodedMatrix(codes, parameters, bits, 64), dense, ceiling)
        key, value = (torch.randn(4096, 56, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache = torch.zeros(65536, reference.token_bytes(56, 128, bits, 64, 2), dtype=torch.uint8, device="cuda")
        slots = torch.randperm(65536, device="cuda")[:4096]
        rate = (
            (key.nbytes + value.nbytes + 4096 * cache.shape[1])
            / seconds(lambda: quant.append_rows(cache, slots, key, value, bits, 64))
            / 1e9
        )
        rows.append({"kernel": "append_rows", "bits": bits, "gbps": rate, "share": rate / ceiling["copy_gbps"]})
    return rows


def few_tokens_rows(weight: torch.Tensor, matrix: CodedMatrix, dense: torch.Tensor, ceiling: Row) -> list[Row]:
    """Products of few tokens with a matrix in codes, and by expanding it; shares are of the bytes of what is stored."""
    rows: list[Row] = []
    stored = matrix.codes.nbytes + matrix.parameters.nbytes
    for tokens in (1, 4, 8, 16, 32, 64):
        x = torch.randn(tokens, weight.shape[1], device="cuda", dtype=weight.dtype)

        def expanded(x: torch.Tensor = x) -> torch.Tensor:
            out = ops.dequantize(matrix.codes, matrix.parameters, weight.shape[1], matrix.bits, matrix.group, out=dense)
            return ops.linear(x, out)

        works: list[tuple[str, int, Callable[[], object]]] = [
            ("product", weight.nbytes, lambda x=x: ops.linear(x, weight)),  # type: ignore[misc]
            ("product with codes", stored, lambda x=x: ops.linear(x, matrix)),  # type: ignore[misc]
            ("expand and product", stored, expanded),
        ]
        for name, num_bytes, work in works:
            rate = num_bytes / seconds(work) / 1e9
            row: Row = {"kernel": name, "bits": 16 if name == "product" else matrix.bits, "tokens": tokens}
            rows.append(row | {"gbps": rate, "share": rate / ceiling["copy_gbps"]})
    return rows


def norm_rows(ceiling: Row) -> list[Row]:
    from flexbatch.kernels import norm_rope

    x, residual, weight = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((16384, 8192), (16384, 8192), (8192,))
    )
    gate_up, fused = (
        torch.randn(8192, 28672, device="cuda", dtype=torch.bfloat16),
        torch.randn(16384, 48 * 128, device="cuda", dtype=torch.bfloat16),
    )
    query, key = fused[:, : 32 * 128].unflatten(1, (32, 128)), fused[:, 32 * 128 : 40 * 128].unflatten(1, (8, 128))
    cos, sin = torch.randn(2, 16384, 64, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(16384, device="cuda")
    works: list[tuple[str, float, Callable[[], object]]] = [
        ("rms_norm + residual", 4.0 * x.nbytes, lambda: norm_rope.rms_norm(x, weight, 1e-5, residual=residual)),
        ("layer_norm", 2.0 * x.nbytes, lambda: norm_rope.layer_norm(x, weight, weight, 1e-5)),
        (
            "rotary",
            2.0 * (query.nbytes + key.nbytes),
            lambda: norm_rope.rotary(query, key, cos, sin, positions, rotary_dim=128),
        ),
        ("gated silu", 1.5 * gate_up.nbytes, lambda: norm_rope.gated_activation(gate_up, "silu")),
    ]
    rates = [(name, num_bytes / seconds(work) / 1e9) for name, num_bytes, work in works]
    return [{"kernel": name, "gbps": rate, "share": rate / ceiling["copy_gbps"]} for name, rate in rates]
