"""Throughput of one and of several GPUs, and tokens beside those of one: random weights, random distinct prompts, the
plan chosen by the engine.

    python -m benchmark.parallel --output parallel.json
    python -m benchmark.parallel --output parallel.json --models opt-30b --meshes 1 tp2 pp2 --gpu-gib 24 --limit 900

A mesh is 1, or sizes in any order joined by x: tp2, pp2, dp2, pp2xtp2. Every run is a process of its own, ended after
--limit seconds, and its result is written before the next one begins; with an output that exists, what it has is not
run again. Figures are generated tokens / seconds of a whole job, its fill and tail included; loading is not. The bound
is what the busiest links allow.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.machine import machine
from flexbatch.policy.stdout import data_apart, run_process

SIZES = {"dp": "data_parallel_size", "pp": "pipeline_parallel_size", "tp": "tensor_parallel_size"}
RESERVE_GIB = 1.0
"""Of every GPU, outside of the engine's pools: context, libraries, collectives."""
CHECKED = "tokens"
"""The name of the run that compares tokens."""


@dataclass(frozen=True)
class Case:
    """A model and a job whose number of prompts is prime: nothing divides evenly."""

    model: str
    settings: dict[str, Any]
    prompts: int
    prompt_tokens: int
    new_tokens: int


CASES = {
    "opt-30b": Case("opt-30b", {}, 383, 512, 32),
    "llama-3-70b": Case("llama-3-70b", {"weight_bits": 4, "cache_bits": 4}, 1021, 512, 32),
    "llama-3-8b": Case("llama-3-8b", {}, 509, 512, 64),
}


def sizes_of(mesh: str) -> dict[str, int]:
    """The settings of a mesh. Raises ValueError."""
    parts = [] if mesh == "1" else [re.fullmatch(r"(dp|pp|tp)([1-9]\d*)", part) for part in mesh.split("x")]
    if None in parts:
        raise ValueError(f"mesh {mesh!r}: 1, or sizes as in tp2, pp2, dp2, pp2xtp2")
    return {SIZES[part[1]]: int(part[2]) for part in parts if part is not None}


def random_prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Distinct ones, of different lengths."""
    generator = random.Random(seed)
    lengths = [generator.randint(3 * tokens // 4, tokens) for _ in range(count)]
    return [[generator.randrange(10, vocabulary) for _ in range(length)] for length in lengths]


def measured(case: Case, gpu_gib: float, sizes: dict[str, int], more: dict[str, Any]) -> dict[str, Any]:
    """One job on one mesh."""
    from flexbatch import LLM, SamplingParams

    settings = {"gpu_memory": f"{gpu_gib - RESERVE_GIB}GiB", "dtype": "bfloat16", **case.settings, **sizes, **more}
    params = SamplingParams(max_tokens=case.new_tokens, temperature=0, ignore_eos=True)
    with LLM(case.model, dummy_weights=True, **settings) as llm:
        prompts = random_prompts(case.prompts, case.prompt_tokens, llm.arch.vocab_size, seed=1)
        began = time.perf_counter()
        llm.prepare(prompts, params)
        # Kernels compile and the links wake up.
        warm_up = random_prompts(61, case.prompt_tokens, llm.arch.vocab_size, seed=3)
        llm.generate(warm_up, SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
        prepared = time.perf_counter()
        answers = llm.generate(prompts, params)
        seconds = time.perf_counter() - prepared
        report = llm.report()
    tokens = sum(len(answer.token_ids) for answer in answers)
    names = ("plan", "prediction", "job", "policy", "percent", "memory", "peak_bytes", "moved_bytes", "passes")
    prediction = report.get("prediction", {})
    predicted = prediction.get("predicted_tokens_per_second")
    return {
        "load_seconds": prepared - began,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "predicted_tokens_per_second": predicted,
        "bound_tokens_per_second": prediction.get("bound_tokens_per_second"),
        "measured_over_predicted": tokens / seconds / predicted if predicted else None,
        **{name: report[name] for name in names if name in report},
    }


def checked(model: str, sizes: dict[str, int], device: str) -> dict[str, Any]:
    """Greedy tokens of a small model in float32, weights and cache on GPU and host."""
    from flexbatch import LLM, SamplingParams

    settings = {"dtype": "float32", "percent": (40, 60, 40, 60, 50, 50), "gpu_batch_size": 3, "num_gpu_batches": 2}
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
    with LLM(model, device=device, gpu_memory="4GiB", cpu_memory="4GiB", **settings, **sizes) as llm:
        prompts = random_prompts(13, 90, min(256, llm.arch.vocab_size), seed=2)
        return {"token_ids": [answer.token_ids for answer in llm.generate(prompts, params)]}


def run_one(words: dict[str, Any]) -> dict[str, Any]:
    """In the process of a run."""
    sizes = sizes_of(words["mesh"])
    if words["case"] == CHECKED:
        return checked(words["model"], sizes, words["device"])
    return measured(CASES[words["case"]], words["gpu_gib"], sizes, words["set"])


def in_process(words: dict[str, Any], limit: float) -> dict[str, Any]:
    """A run as a process; what went wrong is its result."""
    command = [sys.executable, "-m", "benchmark.parallel", "--run", json.dumps(words)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=limit, text=True)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {limit:g} s"}
    if done.returncode:
        return {"error": f"exit code {done.returncode}; its error is above"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Of every model and budget, throughput beside one GPU's; and whether tokens are those of one."""
    told: dict[str, Any] = {}
    for name, result in results.items():
        case = name.rpartition(" ")[0]
        one = results.get(f"{case} 1", {})
        if result.get("tokens_per_second") and one.get("tokens_per_second"):
            told[name] = result["tokens_per_second"] / one["tokens_per_second"]
        elif case == CHECKED and "token_ids" in result and "token_ids" in one:
            told[name] = result["token_ids"] == one["token_ids"]
    return told


def runs(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every run by its name."""
    more = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.set)}
    device = "cuda" if arguments.device == "auto" else arguments.device
    check = {"case": CHECKED, "model": arguments.check_model, "device": device}
    found = {f"{CHECKED} {mesh}": {**check, "mesh": mesh} for mesh in arguments.meshes} if arguments.check_model else {}
    for name in arguments.models:
        for gib in arguments.gpu_gib:
            for mesh in arguments.meshes:
                words = {"case": name, "gpu_gib": gib, "mesh": mesh, "set": more}
                found[f"{name} {gib:g}GiB {mesh}"] = words
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--models", nargs="*", default=["opt-30b", "llama-3-70b"], choices=list(CASES))
    parser.add_argument("--meshes", nargs="+", default=["1", "tp2", "pp2", "dp2"])
    parser.add_argument("--gpu-gib", nargs="+", type=float, default=[16.0, 24.0])
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds of one run")
    parser.add_argument("--check-model", default="demo", help="whose tokens are compared; empty: none")
    parser.add_argument("--device", default="auto", help="of that comparison: auto, cuda or cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="further settings of the engine")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with data_apart() as data:
        if arguments.run is not None:
            print(json.dumps(run_one(arguments.run), default=str), file=data)
            return 0
        if arguments.output is None:
            parser.error("--output is needed")
        path: Path = arguments.output
        kept = json.loads(path.read_text())["results"] if path.exists() else {}
        results = {name: result for name, result in kept.items() if "error" not in result}
        for name, words in runs(arguments).items():
            if name not in results:
                print(name, file=sys.stderr, flush=True)
                results[name] = in_process(words, arguments.limit)
            told = {"machine": machine(), "speedup": summary(results), "results": results}
            path.write_text(json.dumps(told, indent=1))
        print(json.dumps(summary(results), indent=1), file=data)
    return 1 if any("error" in result for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(run_process(main))
