"""Kernels against the ceilings of the machine, measured in the same run: checks first, then timings, as JSON.

    python -m benchmark.kernels --output kernels.json             # a GPU; under four minutes
    python -m benchmark.kernels --check-only
    python -m benchmark.kernels --sections cpu                    # needs no GPU

Ceilings: a bf16 GEMM for arithmetic, a device copy (bytes read plus written) for GPU memory, the copy engine for the link, a sum over
a large tensor for host memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexbatch.kernels import native, reference

Row = dict[str, Any]
MIB = 1 << 20


def seconds(work: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
    """Median seconds of ``work`` on the current CUDA stream."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
) -> tuple[tuple[torch.Tensor, ...], Row]:
    """Arguments of `paged_attention` over random pages of 16 tokens; rows of 8 and 4 bits have groups of 64."""
    pages_each = -(-max(contexts) // 16)
    num_pages = pages_each * len(contexts)
    shape = (num_pages * 16, 2, kv_heads, head_dim)
    if bits == 16:
        rows = torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
        for part in rows.split(1 << 16):
            part.normal_()
    else:
        key, value = (torch.randn(shape[0], kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        rows = reference.pack_rows(key, value, bits, 64)
    table = torch.randperm(num_pages, device=device).view(len(contexts), pages_each).int()
    query = torch.randn(sum(queries), heads, head_dim, dtype=dtype, device=device)
    starts, lens = torch.tensor([0, *queries], device=device).cumsum(0).int(), torch.tensor(contexts, device=device).int()
    options: Row = {"num_kv_heads": kv_heads, "page_tokens": 16, "scale": head_dim**-0.5, "bits": bits}
    options |= {"max_query_len": max(queries), "max_context_len": max(contexts)}
    if tree:  # chains with side branches: every token sees the even ones before it, and itself
        size, words = max(queries), -(-max(queries) // 32)
        seen = (torch.ones(size, words * 32).tril(-1) * (torch.arange(words * 32) % 2 == 0) + torch.eye(size, words * 32)).long()
        packed = (seen.view(size, words, 32) << torch.arange(32)).sum(-1)
        packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
        options["tree_masks"] = torch.cat([packed[:n] for n in queries]).to(device)
        depths = [context - n + seen[:n].sum(-1) - 1 for n, context in zip(queries, contexts, strict=True)]
        options["positions"] = torch.cat(depths).int().to(device)
    return (query, rows, table, starts, lens), options


SHAPES = ((16, False, 8, 2, 128), (16, True, 4, 4, 80), (8, False, 8, 1, 64), (4, False, 4, 2, 128), (4, True, 4, 4, 256))
"""Bits, tree, heads, KV heads, head size."""


def check(device: str, only: int | None = None) -> list[Row]:
    """Largest error of every kernel against the oracle: attention within a tolerance, quantisation bit for bit with the oracle on the CPU."""
    from flexbatch.kernels import attention, quant

    dtypes = (torch.float32, torch.float16) if device == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
    tolerances = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    rows: list[Row] = []
    for dtype in dtypes:
        for number, (bits, tree, heads, kv_heads, head_dim) in enumerate(SHAPES):
            if only is not None and number != only:
                continue
            for queries, contexts, splits in (([1, 70, 3], [200, 90, 33], 1), ([1, 1, 1], [300, 7, 129], 4)):
                call, options = attention_call(queries, contexts, heads, kv_heads, head_dim, bits=bits, tree=tree, dtype=dtype, device=device)
                wanted = reference.paged_attention(*call, **options).float()
                row = {"kernel": "attention", "dtype": str(dtype), "bits": bits, "tree": tree, "heads": f"{heads}/{kv_heads}x{head_dim}", "splits": splits}
                print(f"checking {row}", file=sys.stderr, flush=True)
                error = (attention.paged_attention(*call, **options, splits=splits).float() - wanted).abs().max().item()
                rows.append(row | {"error": error, "ok": error < tolerances[dtype]})
        for bits in (8, 4):
            weight = torch.randn(192, 320).to(dtype)
            for dim in (-1, 0):
                wanted, got = reference.quantize(weight, bits, 64, dim), quant.quantize(weight.to(device), bits, 64, dim)
                same = [torch.equal(x, y.cpu()) for x, y in zip(wanted, got, strict=True)]
                expanded = quant.dequantize(*(x.to(device) for x in wanted), weight.shape[dim], bits, 64, dim).cpu()
                same.append(torch.equal(expanded, reference.dequantize(*wanted, weight.shape[dim], bits, 64, dim)))
                rows.append({"kernel": "quantisation", "dtype": str(dtype), "bits": bits, "dim": dim, "same codes, parameters, values": same, "ok": all(same)})
    return rows


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
    return sum(4.0 * heads * head_dim * q * (context - (q - 1) / 2) for q, context in zip(queries, contexts, strict=True))


PREFILL = {
    "OPT-30B shape, 16 prompts of 512": ([512] * 16, [512] * 16, 56, 56, 128),
    "Llama-3-8B shape, one prompt of 8192": ([8192], [8192], 32, 8, 128),
    "Llama-3-8B shape, 8 chunks of 512 at 4096": ([512] * 8, [4096] * 8, 32, 8, 128),
    "Llama-3-8B shape, 64 ragged prompts": ([20 + 6 * i for i in range(64)], [20 + 6 * i for i in range(64)], 32, 8, 128),
    "head of 80, 16 prompts of 1024": ([1024] * 16, [1024] * 16, 32, 32, 80),
}
DECODE = {
    "OPT-30B shape, 64 x 512": ([1] * 64, [512] * 64, 56, 56, 128),
    "Llama-3-8B shape, 64 x 4096": ([1] * 64, [4096] * 64, 32, 8, 128),
    "Llama-3-70B shape, 64 x 2048": ([1] * 64, [2048] * 64, 64, 8, 128),
    "Llama-3-8B shape, 2 x 65536": ([1] * 2, [65536] * 2, 32, 8, 128),
}


def attention_rows(ceiling: Row) -> list[Row]:
    from flexbatch.kernels import attention

    rows = []
    for name, (queries, contexts, heads, kv_heads, head_dim) in PREFILL.items():
        call, options = attention_call(queries, contexts, heads, kv_heads, head_dim)
        rate = attention_flops(queries, contexts, heads, head_dim) / seconds(lambda: attention.paged_attention(*call, **options)) / 1e12  # noqa: B023
        rows.append({"kernel": "prefill", "case": name, "tflops": rate, "share": rate / ceiling["gemm_tflops"]})
    for name, (queries, contexts, heads, kv_heads, head_dim) in DECODE.items():
        for bits, size, tree in ((16, 1, False), (8, 1, False), (4, 1, False), (16, 16, True)):
            call, options = attention_call([size] * len(queries), contexts, heads, kv_heads, head_dim, bits=bits, tree=tree)
            num_bytes = sum(contexts) * call[1][0].numel() * call[1].element_size()
            rate = num_bytes / seconds(lambda: attention.paged_attention(*call, **options)) / 1e9  # noqa: B023
            rows.append({"kernel": "tree of 16" if tree else "decode", "case": name, "bits": bits, "gbps": rate, "share": rate / ceiling["copy_gbps"]})
            del call
    mixed = ([1] * 96 + [512] * 4, [600] * 96 + [512] * 4)
    call, options = attention_call(*mixed, 56, 56, 128)
    rows.append({"kernel": "mixed pass", "case": "96 tokens at 600, 4 chunks of 512", "ms": seconds(lambda: attention.paged_attention(*call, **options)) * 1e3})
    return rows


def tuning_rows() -> list[Row]:
    """Every tile shape that compiles, on one prefill and one decode."""
    from flexbatch.kernels import attention

    rows = []
    for name, case, heights in (
        ("prefill", PREFILL["Llama-3-8B shape, 8 chunks of 512 at 4096"], (64, 128)),
        ("decode", DECODE["Llama-3-8B shape, 64 x 4096"], (16,)),
    ):
        call, options = attention_call(*case)
        for block_m in heights:
            for block_n in (32, 64, 128):
                for warps, stages in ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3)):
                    launch = attention.Launch(block_m, block_n, warps, stages)
                    try:
                        took = seconds(lambda: attention.paged_attention(*call, **options, launch=launch), 5, 1)  # noqa: B023
                    except Exception as error:  # a tile may want more shared memory than there is
                        rows.append({"kernel": name, "launch": str(launch), "error": str(error)[:80]})
                        continue
                    rows.append({"kernel": name, "launch": str(launch), "ms": took * 1e3})
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
            gather = seconds(lambda: pages.gather_pages(source, ids.int(), staging, num_programs=programs), 5, 1)  # noqa: B023
            scatter = seconds(lambda: pages.scatter_rows(staging, source, ids, num_programs=programs), 5, 1)  # noqa: B023
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(6):
                    pages.gather_pages(source, ids.int(), staging, num_programs=programs)
            beside = seconds(lambda: a @ b, 10, 2)
            still_running = not side.query()
            torch.cuda.synchronize()
            row: Row = {"kernel": "pages", "page_bytes": page_bytes, "programs": programs, "gather_gbps": staging.numel() / gather / 1e9}
            row |= {"scatter_gbps": staging.numel() / scatter / 1e9, "gemm_slowdown": beside / alone - 1, "gather_outlasted_gemms": still_running}
            row |= {"gather_share": row["gather_gbps"] / ceiling["h2d_gbps"], "scatter_share": row["scatter_gbps"] / ceiling["d2h_gbps"]}
            rows.append(row)
    return rows


def quant_rows(ceiling: Row) -> list[Row]:
    from flexbatch.kernels import quant

    rows: list[Row] = []
    weight = torch.randn(28672, 8192, device="cuda", dtype=torch.bfloat16)
    dense = torch.empty_like(weight)
    for bits in (8, 4):
        for dim in (-1, 0):
            codes, parameters = quant.quantize(weight, bits, 64, dim)
            moved = weight.nbytes + codes.nbytes + parameters.nbytes
            for name, work in (
                ("quantize", lambda: quant.quantize(weight, bits, 64, dim)),  # noqa: B023
                ("dequantize", lambda: quant.dequantize(codes, parameters, weight.shape[dim], bits, 64, dim, out=dense)),  # noqa: B023
            ):
                rate = moved / seconds(work) / 1e9
                rows.append({"kernel": name, "bits": bits, "dim": dim, "gbps": rate, "share": rate / ceiling["copy_gbps"]})
        codes, parameters = quant.quantize(weight, bits, 64)
        for tokens in (1, 8, 16):
            x = torch.randn(tokens, weight.shape[1], device="cuda", dtype=torch.bfloat16)
            fused = seconds(lambda: quant.quantized_linear(x, codes, parameters, bits, 64))  # noqa: B023
            apart = seconds(lambda: x @ quant.dequantize(codes, parameters, weight.shape[1], bits, 64, out=dense).T)  # noqa: B023
            rows.append({"kernel": "quantized_linear", "bits": bits, "tokens": tokens, "fused_us": fused * 1e6, "expand_and_gemm_us": apart * 1e6})
        key, value = (torch.randn(4096, 56, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache = torch.zeros(65536, reference.token_bytes(56, 128, bits, 64, 2), dtype=torch.uint8, device="cuda")
        slots = torch.randperm(65536, device="cuda")[:4096]
        rate = (key.nbytes + value.nbytes + 4096 * cache.shape[1]) / seconds(lambda: quant.append_rows(cache, slots, key, value, bits, 64)) / 1e9  # noqa: B023
        rows.append({"kernel": "append_rows", "bits": bits, "gbps": rate, "share": rate / ceiling["copy_gbps"]})
    return rows


def norm_rows(ceiling: Row) -> list[Row]:
    from flexbatch.kernels import norm_rope

    x, residual, weight = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((16384, 8192), (16384, 8192), (8192,)))
    gate_up, fused = torch.randn(8192, 28672, device="cuda", dtype=torch.bfloat16), torch.randn(16384, 48 * 128, device="cuda", dtype=torch.bfloat16)
    query, key = fused[:, : 32 * 128].unflatten(1, (32, 128)), fused[:, 32 * 128 : 40 * 128].unflatten(1, (8, 128))
    cos, sin = torch.randn(2, 16384, 64, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(16384, device="cuda")
    works: list[tuple[str, float, Callable[[], object]]] = [
        ("rms_norm + residual", 4.0 * x.nbytes, lambda: norm_rope.rms_norm(x, weight, 1e-5, residual=residual)),
        ("layer_norm", 2.0 * x.nbytes, lambda: norm_rope.layer_norm(x, weight, weight, 1e-5)),
        ("rotary", 2.0 * (query.nbytes + key.nbytes), lambda: norm_rope.rotary(query, key, cos, sin, positions, rotary_dim=128)),
        ("gated silu", 1.5 * gate_up.nbytes, lambda: norm_rope.gated_activation(gate_up, "silu")),
    ]
    rates = [(name, num_bytes / seconds(work) / 1e9) for name, num_bytes, work in works]
    return [{"kernel": name, "gbps": rate, "share": rate / ceiling["copy_gbps"]} for name, rate in rates]


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
    rows: list[Row] = [{"kernel": "host memory read", "threads": threads, "gbps": plain.nbytes / host_seconds(lambda: plain.sum()) / 1e9}]
    for heads, kv_heads, bits, dtype in ((56, 56, 16, torch.bfloat16), (32, 8, 16, torch.bfloat16), (64, 8, 16, torch.bfloat16), (56, 56, 4, torch.bfloat16)):
        count = sequences * 56 // kv_heads // (1 if bits == 16 else 4)
        call, options = attention_call([1] * count, [512] * count, heads, kv_heads, 128, bits=bits, dtype=dtype, device="cpu", pinned=cuda and bits == 16)
        num_bytes = 512 * count * call[1][0].numel() * call[1].element_size()
        attend = lambda: native.paged_attention(*call, **options, threads=threads)  # noqa: B023, E731
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
    source, target = torch.ones(512 * MIB, dtype=torch.uint8).pin_memory(), torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
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


def machine() -> Row:
    def run(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": next((line.split(":")[1].strip() for line in run("lscpu").splitlines() if line.startswith("Model name")), platform.processor()),
        "commit": run("git", "rev-parse", "HEAD"),
    }


def main() -> int:
    sections = ("attention", "pages", "quant", "norm", "cpu", "tune")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--only", type=int, help="check only this one of the attention shapes (a bad address ends the process)")
    parser.add_argument("--check-only", action="store_true", help="compare with the oracle and stop")
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections[:5], help="what to time; tune tries tile shapes")
    parser.add_argument("--cpu-sequences", type=int, default=128, help="sequences of 512 tokens in CPU attention (of 14 MiB each)")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    result: Row = {"machine": machine(), "checks": [], "rows": []}

    def add(rows: list[Row]) -> None:
        result["rows"] += rows
        for row in rows:
            print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}), file=sys.stderr, flush=True)

    if cuda or arguments.check_only:
        result["checks"] = check("cuda" if cuda else "cpu", arguments.only)
        wrong = [row for row in result["checks"] if not row["ok"]]
        print(f"{len(result['checks']) - len(wrong)} checks passed, {len(wrong)} failed", *wrong, sep="\n", file=sys.stderr, flush=True)
    if not arguments.check_only:
        if cuda:
            result["ceilings"] = ceilings()
            add([result["ceilings"]])
            works = {"attention": attention_rows, "pages": page_rows, "quant": quant_rows, "norm": norm_rows}
            for name in arguments.sections:
                if name in works:
                    add(works[name](result["ceilings"]))
                    torch.cuda.empty_cache()
        if "cpu" in arguments.sections:
            add(cpu_rows(arguments.cpu_sequences))
        if cuda and "tune" in arguments.sections:
            add(tuning_rows())
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["ok"] for row in result["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
