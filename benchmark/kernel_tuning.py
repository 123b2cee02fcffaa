"""Launch shapes of the kernels tried on this GPU: each checked, timed and written at once, so that a crash keeps what
came before.

    python -m benchmark.kernel_tuning --output tune.jsonl          # about two minutes, compilation by several processes
    included

Errors are against the oracle (prefill: torch's attention), of quantization the number of different codes and
parameters. Ceilings come first.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmark.decode_trials import short_trials
from benchmark.gemm_trials import gemm_trials
from benchmark.kernel_cases import DECODE, MIB, PREFILL, Row, attention_call, seconds
from benchmark.kernel_timings import attention_flops, ceilings
from benchmark.kernel_trials import Trial, coded_trials, difference
from benchmark.layer_trials import head_trials, product_trials
from flexbatch.kernels import attention, attention_reference, pages, quant, reference
from flexbatch.policy.stdout import data_apart, run_process

SHORT, LONG = "OPT-30B shape, 16 prompts of 512", "Llama-3-8B shape, one prompt of 8192"
PREFILL_LAUNCHES = [  # query rows, keys, warps, stages, registers
    *((64, 64, 4, stages, 0) for stages in (2, 3)),
    (64, 32, 4, 3, 0),
    (64, 128, 4, 2, 0),
    *((128, 64, 8, stages, registers) for stages in (2, 3) for registers in (0, 128)),
    (128, 64, 4, 2, 0),
    (128, 64, 4, 3, 0),
    (128, 32, 4, 3, 0),
    (128, 32, 8, 3, 128),
    (128, 128, 8, 2, 0),
    (128, 128, 4, 2, 0),
]
DECODE_LAUNCHES = [
    (keys, warps, stages) for keys, warps in ((16, 2), (32, 2), (32, 4), (64, 4), (64, 8)) for stages in (1, 3)
]
SHARED_LAUNCHES = [
    *((32, 1, stages, 0) for stages in (2, 3, 4)),
    *((32, 1, 3, registers) for registers in (128, 168)),
    *((keys, warps, stages, 0) for keys, warps in ((64, 1), (64, 2), (128, 4)) for stages in (2, 3)),
]


def sdpa(call: tuple[torch.Tensor, ...], options: Row) -> torch.Tensor:
    """Causal attention of whole prompts of one length by torch's own kernels."""
    query, rows, table = call[:3]
    length = len(query) // len(table)
    slots = (
        table.long()[:, :, None] * options["page_tokens"] + torch.arange(options["page_tokens"], device=query.device)
    ).flatten(1)[:, :length]
    key, value = (rows[slots, side].transpose(1, 2) for side in range(2))
    q = query.view(len(table), length, *query.shape[1:]).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(query.shape)


def prefill_trials() -> Iterator[Trial]:
    for name in (SHORT, LONG):
        queries, contexts, heads, kv_heads, head_dim = PREFILL[name]
        call, options = attention_call(queries, contexts, heads, kv_heads, head_dim)
        wanted, flops = sdpa(call, options), attention_flops(queries, contexts, heads, head_dim)
        rate = lambda took, flops=flops: {"tflops": flops / took / 1e12}  # noqa: E731
        yield Trial(
            {"kernel": "torch sdpa", "case": name}, lambda c=call, o=options: sdpa(c, o), difference(wanted), rate
        )
        for launch in PREFILL_LAUNCHES:
            shape = attention.AttentionLaunch(*launch)
            work = lambda c=call, o=options, s=shape: attention.paged_attention(*c, **o, launch=s)  # noqa: E731
            yield Trial({"kernel": "prefill", "case": name, "launch": launch}, work, difference(wanted), rate)


def decode_trials(names: Iterable[str] = ("OPT-30B shape, 64 x 512",)) -> Iterator[Trial]:
    for name in names:
        queries, contexts, heads, kv_heads, head_dim = DECODE[name]
        own = heads == kv_heads
        for bits in (16, 8, 4):
            call, options = attention_call(queries, contexts, heads, kv_heads, head_dim, bits=bits)
            num_bytes = sum(contexts) * call[1][0].numel() * call[1].element_size()
            wanted = attention_reference.paged_attention(*call, **options)
            rate = lambda took, n=num_bytes: {"gbps": n / took / 1e9}  # noqa: E731
            single = [(1, *launch) for launch in (DECODE_LAUNCHES if own else SHARED_LAUNCHES)]
            for launch in [*(single if bits != 16 else ()), (16, 64, 4, 3)]:
                middle = launch[:2] == (1, 32) if own else launch == (1, 32, 1, 3, 0)
                for splits in (0, 1, 4) if middle else (0,):
                    shape = attention.AttentionLaunch(*launch)
                    work = functools.partial(attention.paged_attention, *call, **options, launch=shape, splits=splits)
                    row = {"kernel": "decode", "case": name, "bits": bits, "launch": launch, "splits": splits}
                    yield Trial(row, work, difference(wanted), rate)


def shared_trials() -> Iterator[Trial]:
    """Heads that several query heads share."""
    return decode_trials(name for name, (_, _, heads, kv_heads, _) in DECODE.items() if heads != kv_heads)


def quant_trials() -> Iterator[Trial]:
    weight = torch.randn(28672, 8192, device="cuda", dtype=torch.bfloat16)
    for bits in (8, 4):
        wanted = reference.quantize(weight[:1024].cpu(), bits, 64)  # torch divides by a constant inexactly on a GPU
        moved = weight.nbytes + len(weight) // 1024 * sum(x.nbytes for x in wanted)
        for tile in (1024, 2048, 4096, 8192):
            for warps in (2, 4, 8):
                launch = quant.QuantizeLaunch(tile, warps)
                yield Trial(
                    {"kernel": "quantize", "bits": bits, "launch": [tile, warps]},
                    lambda b=bits, s=launch: quant.quantize(weight, b, 64, launch=s),
                    lambda got, w=wanted: float(
                        sum((x[:1024].cpu() != y).sum().item() for x, y in zip(got, w, strict=True))
                    ),
                    lambda took, m=moved: {"gbps": m / took / 1e9},
                )


def page_trials() -> Iterator[Trial]:
    host = torch.ones(512 * MIB, dtype=torch.uint8).pin_memory()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    alone = seconds(lambda: a @ b)
    for page_bytes in (65536, 448 * 1024):
        source = host[: host.numel() // page_bytes * page_bytes].view(-1, page_bytes)
        ids = torch.randperm(source.shape[0], device="cuda")[: source.shape[0] // 2].int()
        staging = torch.empty(len(ids), page_bytes, dtype=torch.uint8, device="cuda")
        for programs, tile, warps in [
            (p, t, w) for p in (8, 16, 24, 32) for t, w in ((8192, 4), (16384, 4), (16384, 8), (32768, 8))
        ]:

            def work(
                p: int = programs, t: int = tile, w: int = warps, s: Any = source, i: Any = ids, d: Any = staging
            ) -> torch.Tensor:
                pages.gather_pages(s, i, d, num_programs=p, tile_bytes=t, num_warps=w)
                return d

            def beside(took: float, work: Callable[[], Any] = work, n: int = staging.numel()) -> Row:
                side = torch.cuda.Stream()
                with torch.cuda.stream(side):
                    for _ in range(5):
                        work()
                slowed = seconds(lambda: a @ b, 8, 1)
                outlasted = not side.query()
                torch.cuda.synchronize()
                return {"gbps": n / took / 1e9, "gemm_slowdown": slowed / alone - 1, "outlasted": outlasted}

            row = {"kernel": "gather", "page_bytes": page_bytes, "launch": [programs, tile, warps]}
            yield Trial(row, work, lambda got: float((got != 1).sum().item()), beside)


SECTIONS = {
    "prefill": prefill_trials,
    "decode": decode_trials,
    "shared": shared_trials,
    "short": short_trials,
    "coded": coded_trials,
    "gemm": gemm_trials,
    "quant": quant_trials,
    "pages": page_trials,
    "heads": head_trials,
    "products": product_trials,
}


COMPILED_AHEAD = ("prefill", "decode", "shared", "short", "coded", "gemm", "quant", "heads")


def compile_ahead(parts: int, sections: Iterable[str]) -> None:
    """Every trial once, shared out over processes: the compiler's cache on disk hands its work on."""
    command = [sys.executable, "-m", "benchmark.kernel_tuning", "--sections", *sections, "--part"]
    workers = [subprocess.Popen([*command, f"{part}/{parts}"]) for part in range(parts)]
    for worker in workers:
        worker.wait()


def compile_part(part: int, parts: int, sections: Iterable[str]) -> None:
    number = 0
    for name in set(COMPILED_AHEAD).intersection(sections):
        for trial in SECTIONS[name]():
            number += 1
            if number % parts == part:
                try:
                    trial.work()
                    torch.cuda.synchronize()
                except Exception as error:
                    print(f"{trial.row}: {str(error)[:100]}", file=sys.stderr)
        torch.cuda.empty_cache()


def measure(trial: Trial) -> Row:
    try:
        error = trial.error(trial.work())
        took = seconds(trial.work, 7, 2)
        return (
            trial.row
            | {"us": round(took * 1e6, 1), "error": round(error, 5)}
            | {k: round(v, 3) for k, v in trial.rate(took).items()}
        )
    except Exception as error:  # a tile may want more shared memory than there is
        return trial.row | {"failed": str(error)[:160]}


def tuning_rows(sections: Iterable[str] = tuple(SECTIONS), limit_s: float = 130.0, processes: int = 8) -> Iterator[Row]:
    """Ceilings, then a row of every trial that starts within ``limit_s``; ``processes`` compile ahead (0: none)."""
    begun = time.monotonic()
    if processes:
        compile_ahead(processes, sections)
    yield {"kernel": "ceilings", "compiled_s": round(time.monotonic() - begun, 1)} | ceilings()
    for name in sections:
        for trial in SECTIONS[name]():
            if time.monotonic() - begun < limit_s:
                yield measure(trial)
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tune.jsonl"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=130.0, help="start no configuration after this time")
    parser.add_argument("--processes", type=int, default=8, help="compile ahead in so many processes (0: not)")
    parser.add_argument("--part", help="internal: compile part i/n and stop")
    arguments = parser.parse_args()
    with data_apart() as data:
        torch.manual_seed(0)
        if arguments.part:
            part, parts = map(int, arguments.part.split("/"))
            compile_part(part, parts, arguments.sections)
            return 0
        begun = time.monotonic()
        lines: list[str] = []
        with arguments.output.open("w") as file:
            for row in tuning_rows(arguments.sections, arguments.seconds, arguments.processes):
                file.write(json.dumps(row) + "\n")
                file.flush()
                lines.append(
                    " | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
                )
        print(*lines, f"{len(lines)} rows in {time.monotonic() - begun:.0f} s", sep="\n", file=data)
        return 0


if __name__ == "__main__":
    raise SystemExit(run_process(main))
