"""A layer of experts by every way there is, against the ceilings of the GPU: checks first, then timings, as a table and
as JSON.

    python -m benchmark.expert_kernels --output experts.json                # under 150 s on an H100
    python -m benchmark.expert_kernels --tune --output tune.json            # tile shapes; --seconds limits it

Ways: torch's grouped product (codes are expanded to memory before it), one product after another, and Triton in every
form of the weights. Times are of whole layers, routing to weighted sum: of CUDA graphs where the way can be recorded,
else of launches. The ceiling is the larger of the bytes of weights and rows over the rate of a copy and the FLOPs over
those of a large product.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark import grouped_product
from benchmark.kernel_cases import Row, seconds
from benchmark.kernel_timings import ceilings
from benchmark.machine import machine
from flexbatch.kernels import expert_products, experts, ops
from flexbatch.kernels.expert_codes import CodeForm, ExpertCodes, ExpertStacks, GatedActivation, stacks_of
from flexbatch.kernels.expert_products import ExpertLaunch
from flexbatch.policy.stdout import data_apart, run_process

SHAPES = {"qwen3-30b-a3b": (2048, 768, 128, 8), "mixtral": (4096, 14336, 8, 2), "gpt-oss-120b": (2880, 2880, 128, 4)}
"""Hidden size, width, experts, choices."""
TOKENS = (4, 16, 64, 256, 1024)
"""Of an expert."""
FORMS = {
    "16": CodeForm(),
    "8": CodeForm(8, 64),
    "4": CodeForm(4, 64),
    "mxfp4": CodeForm(4, 32, floats=True),
}
STORED_BITS = {"16": 16.0, "8": 8.5, "4": 4.5, "mxfp4": 4.25}
GATE = GatedActivation()
TRIED = {
    "16": [ExpertLaunch(*shape) for shape in (
        (128, 16, 128, 4, 3), (128, 16, 256, 4, 3), (64, 16, 256, 4, 4), (256, 16, 128, 8, 3), (64, 16, 128, 4, 5),
        (128, 64, 128, 4, 3), (128, 64, 128, 8, 4), (256, 64, 128, 8, 3), (128, 64, 256, 8, 2),
        (128, 128, 128, 4, 3), (128, 128, 128, 8, 4), (256, 128, 128, 8, 3), (128, 256, 128, 8, 3),
    )],
    "4": [ExpertLaunch(*shape) for shape in (
        (64, 16, 64, 4, 3), (128, 16, 32, 4, 3), (128, 16, 64, 8, 3), (64, 16, 128, 4, 3), (128, 16, 128, 8, 3),
        (64, 16, 64, 4, 5), (128, 16, 64, 4, 5), (128, 64, 32, 8, 3), (128, 64, 64, 4, 3), (128, 64, 128, 8, 2),
        (128, 64, 64, 8, 4), (64, 64, 64, 4, 4), (128, 128, 32, 8, 4), (128, 128, 64, 8, 4), (128, 128, 128, 8, 2),
        (128, 256, 32, 8, 3), (256, 128, 32, 8, 3), (256, 128, 64, 8, 2),
    )],
}  # fmt: skip
"""Rows, tokens, bytes of a step, warps, stages; codes of 8 bits and MXFP4 take those of 4 bits."""


@dataclass(frozen=True)
class Layer:
    """The experts of a model in one form."""

    name: str
    form: str
    gate_up: ExpertStacks
    down: ExpertStacks


def layer_of(name: str, form: str) -> Layer:
    hidden, width, count, _ = SHAPES[name]
    return Layer(
        name,
        form,
        *(stacks_of([(0, _matrices(count, *shape, FORMS[form]))]) for shape in ((2 * width, hidden), (hidden, width))),
    )


def _matrices(count: int, rows: int, columns: int, form: CodeForm) -> Tensor | ExpertCodes:
    if form.floats:
        codes = torch.randint(256, (count, rows, columns // 2), dtype=torch.uint8, device="cuda")
        scales = torch.randint(117, 121, (count, rows, columns // 32), dtype=torch.uint8, device="cuda")
        return ExpertCodes(codes, scales, columns, form)
    values = torch.empty(count, rows, columns, dtype=torch.bfloat16, device="cuda").normal_(std=columns**-0.5)
    return values if form.bits == 16 else ExpertCodes(*ops.quantize(values, form.bits, form.group), columns, form)


def routed(name: str, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, experts and shares: every expert has exactly ``tokens``."""
    hidden, _, count, choices = SHAPES[name]
    rows = tokens * count // choices
    chosen = torch.randperm(rows * choices, device="cuda").remainder_(count).view(rows, choices)
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    return x, chosen, torch.full((rows, choices), 1 / choices, device="cuda")


def by_loop(layer: Layer, given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: experts.by_loop(*given, layer.gate_up, layer.down, GATE)


def by_groups(layer: Layer, given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Codes are expanded first."""

    def work() -> Tensor:
        both = (stacks.units[0][1] for stacks in (layer.gate_up, layer.down))
        dense = (each if isinstance(each, Tensor) else each.dense(torch.bfloat16) for each in both)
        return grouped_product.by_groups(*given, *dense, GATE)

    return work


def by_triton(layer: Layer, given: tuple[Tensor, ...], launch: ExpertLaunch | None = None) -> Callable[[], Tensor]:
    return lambda: expert_products.expert_mlp(*given, layer.gate_up, layer.down, GATE, launch=launch)


def recorded(work: Callable[[], Tensor]) -> Callable[[], object] | None:
    """The replay of a CUDA graph of it; None where it waits for the GPU, and so cannot be one."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def timed(name: str, form: str, tokens: int, work: Callable[[], Tensor], ceiling: Row, graphs: bool = True) -> Row:
    hidden, width, count, choices = SHAPES[name]
    replay = recorded(work) if graphs else None
    took = seconds(replay or work, 5, 2)
    rows = tokens * count
    weights = 3 * hidden * width * count
    flops = 2.0 * rows * 3 * hidden * width
    moved = weights * STORED_BITS[form] / 8 + 2.0 * rows * (2 * hidden / choices + 2 * width + 2 * hidden)
    memory, compute = moved / ceiling["copy_gbps"] / 1e9, flops / ceiling["gemm_tflops"] / 1e12
    return {
        "us": took * 1e6,
        "gbps": moved / took / 1e9,
        "tflops": flops / took / 1e12,
        "share": max(memory, compute) / took,
        "limit": "memory" if memory > compute else "compute",
        "graph": replay is not None,
    }


def errors(name: str, form: str) -> Row:
    """Of Triton against the loop, at two sizes."""
    layer, found = layer_of(name, form), []
    for tokens in (4, 64):
        given = routed(name, tokens)
        wanted = by_loop(layer, given)().float()
        found.append(((by_triton(layer, given)().float() - wanted).norm() / wanted.norm()).item())
    return {"shape": name, "form": form, "error": max(found), "ok": max(found) < 0.01}


def timing_rows(ceiling: Row, limit_s: float) -> Iterator[Row]:
    """``limit_s``: no further row is begun after it."""
    end = time.monotonic() + limit_s
    for name in SHAPES:
        for form in FORMS:
            layer = layer_of(name, form)
            for tokens in TOKENS:
                given = routed(name, tokens)
                ways = {"triton": by_triton(layer, given)}
                if grouped_product.grouped_mm() is not None:
                    ways["torch grouped"] = by_groups(layer, given)
                if form == "16":
                    ways["loop"] = by_loop(layer, given)
                for way, work in ways.items():
                    if time.monotonic() < end:
                        row = {"shape": name, "form": form, "tokens": tokens, "way": way}
                        yield row | timed(name, form, tokens, work, ceiling, way != "loop")
            del layer, given, ways
            torch.cuda.empty_cache()


def tuning_rows(ceiling: Row, limit_s: float) -> Iterator[Row]:
    """Every launch of `TRIED`, and those that are in use, at the tokens that fill its tile."""
    end = time.monotonic() + limit_s
    for name in ("qwen3-30b-a3b", "gpt-oss-120b", "mixtral"):
        for form in FORMS:
            layer = layer_of(name, form)
            used = expert_products.PLAIN if form == "16" else expert_products.CODED
            for launch in [*used.values(), *TRIED["16" if form == "16" else "4"]]:
                if time.monotonic() > end:
                    return
                row = {"shape": name, "form": form, "tokens": launch.tokens, "launch": list(vars(launch).values())}
                try:
                    given = routed(name, launch.tokens)
                    yield row | timed(name, form, launch.tokens, by_triton(layer, given, launch), ceiling)
                except Exception as error:  # a tile may want more shared memory than there is
                    yield row | {"failed": str(error)[:120]}
            del layer
            torch.cuda.empty_cache()


def compile_part(part: int, parts: int, tune: bool) -> None:
    """Every kernel once: the compiler's cache on disk hands it on to the process that measures."""
    number = 0
    for form in FORMS:
        used = expert_products.PLAIN if form == "16" else expert_products.CODED
        for launch in [*used.values(), *(TRIED["16" if form == "16" else "4"] if tune else [])]:
            number += 1
            if number % parts == part:
                for hidden, width, _, choices in SHAPES.values():
                    x = torch.zeros(8, hidden, device="cuda", dtype=torch.bfloat16)
                    chosen = torch.zeros(8, choices, dtype=torch.int64, device="cuda")
                    few = (
                        stacks_of([(0, _matrices(1, *shape, FORMS[form]))])
                        for shape in ((2 * width, hidden), (hidden, width))
                    )
                    try:
                        by_triton(Layer("", form, *few), (x, chosen, chosen.float()), launch)()
                        torch.cuda.synchronize()
                    except Exception as error:
                        print(f"{form} {launch}: {str(error)[:100]}", file=sys.stderr)


def compile_ahead(parts: int, tune: bool) -> None:
    command = [sys.executable, "-m", "benchmark.expert_kernels", *(["--tune"] if tune else []), "--part"]
    for worker in [subprocess.Popen([*command, f"{part}/{parts}"]) for part in range(parts)]:
        worker.wait()


def line(row: Row) -> str:
    return " | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--tune", action="store_true", help="try tile shapes")
    parser.add_argument("--seconds", type=float, default=100.0, help="begin no row after this time")
    parser.add_argument("--processes", type=int, default=8, help="compile ahead in so many processes (0: not)")
    parser.add_argument("--part", help="internal: compile part i/n and stop")
    arguments = parser.parse_args()
    with data_apart() as data:
        torch.manual_seed(0)
        if arguments.part:
            part, parts = map(int, arguments.part.split("/"))
            compile_part(part, parts, arguments.tune)
            return 0
        begun = time.monotonic()
        if arguments.processes:
            compile_ahead(arguments.processes, arguments.tune)
        result: dict[str, Any] = {
            "machine": machine(),
            "compiled_s": time.monotonic() - begun,
            "checks": [],
            "rows": [],
        }
        result["checks"] = [errors(name, form) for name in SHAPES for form in FORMS]
        result["ceilings"] = ceiling = ceilings()
        print(*map(line, [*result["checks"], ceiling]), sep="\n", file=data, flush=True)
        left = arguments.seconds - (time.monotonic() - begun)
        for row in (tuning_rows if arguments.tune else timing_rows)(ceiling, left):
            result["rows"].append(row)
            print(line(row), file=data, flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{len(result['rows'])} rows in {time.monotonic() - begun:.0f} s", file=data)
        return 0 if all(row["ok"] for row in result["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(run_process(main))
