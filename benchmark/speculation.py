"""Speculation with the bundled demo pair on the CPU: the engine's own plain decoding and speculation by turns, in the same engine.

    python -m benchmark.speculation --prompts ../shared/data/humaneval.jsonl --output benchmark/results/speculation-cpu.json

Every job runs plainly and then with trees (`compare_plain`); the ratio is of the sums over all jobs, those in which costs and acceptance are still unknown
included. Tokens are checked to be the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmark.suite import machine, speculation_of
from flexbatch import LLM, SamplingParams

PLACES = {"gpu": (100, 0, 100, 0, 100, 0), "cpu": (0, 100, 0, 100, 100, 0), "disk": (0, 0, 100, 0, 100, 0)}
"""Where the weights are; the cache is on the gpu tier, with weights on the cpu tier there too."""


def read_prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines() if line.strip()]


def measure(place: str, batch: int, tree: str, draft: list[str], prompts: list[str], gen_len: int, jobs: int, temperature: float) -> dict[str, Any]:
    """``jobs`` jobs of ``batch`` prompts each in one engine."""
    params = SamplingParams(max_tokens=gen_len, temperature=temperature, ignore_eos=True, seed=1)
    source = itertools.cycle(prompts)
    ratios, rates = [], []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"percent": PLACES[place], "gpu_batch_size": batch, "num_gpu_batches": 1, "gpu_memory": "4GiB", "cpu_memory": "1GiB", "device": "cpu"}
        with LLM("demo", draft=tuple(draft), tree=tree, compare_plain=True, offload_dir=folder, **settings) as llm:
            work = [list(itertools.islice(source, batch)) for _ in range(jobs)]
            llm.prepare([prompt for job in work for prompt in job][: batch * jobs], params)
            start = llm.report()
            for job in work:
                before = llm.report()
                llm.generate(job, params)
                after = llm.report()
                rates.append((after["generated_tokens"] - before["generated_tokens"]) / (after["seconds"] - before["seconds"]))
                ratios.append(speculation_of(before["speculation"], after["speculation"], rates[-1])["speed_up"])
            report = llm.report()
    tokens = report["generated_tokens"] - start["generated_tokens"]
    result = speculation_of(start["speculation"], report["speculation"], tokens / report["seconds"])
    return {
        "weights": place,
        "batch": batch,
        "gen_len": gen_len,
        "jobs": jobs,
        "temperature": temperature,
        "tokens_per_second": tokens / report["seconds"],
        "tokens_per_sequence_pass": result["emitted_tokens"] / result["sequence_passes"],
        "draft_share_of_time": result["draft_seconds"] / (result["draft_seconds"] + result["pass_seconds"]),
        "speed_up_by_job": ratios,
        **result,
    }


def row(result: dict[str, Any]) -> str:
    """One line of the table."""
    by_job = result["speed_up_by_job"]
    figures = (f"{result[name]:.4g}" for name in ("plain_tokens_per_second", "tokens_per_second", "speed_up"))
    shares = f"{result['tokens_per_sequence_pass']:.2f} | {result['draft_share_of_time']:.0%} | {min(by_job):.2f} to {max(by_job):.2f}"
    return f"| {result['weights']} | {result['batch']} | {result['tree']} | {' | '.join(figures)} | {shares} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a prompt each")
    parser.add_argument("--draft", nargs="+", default=["demo-draft"])
    parser.add_argument("--trees", nargs="+", default=["auto"])
    parser.add_argument("--places", nargs="+", default=["gpu", "disk"], choices=list(PLACES), help="where the weights are")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--gen-len", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192, help="generated in every row, about; at least three jobs")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    prompts = read_prompts(arguments.prompts)
    results = []
    print("| weights | batch | tree | plain tok/s | tok/s | ratio | tokens/pass | draft share | ratio by job |\n" + "| --- " * 9 + "|")
    for place, batch, tree in itertools.product(arguments.places, arguments.batches, arguments.trees):
        jobs = max(3, arguments.tokens // (batch * arguments.gen_len))
        results.append(measure(place, batch, tree, arguments.draft, prompts, arguments.gen_len, jobs, arguments.temperature))
        print(row(results[-1]), flush=True)
        if arguments.output:
            host = {**machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()}
            worst = min(result["speed_up"] for result in results)
            summary = {"lowest_ratio": worst, "median_ratio": statistics.median(result["speed_up"] for result in results)}
            arguments.output.write_text(json.dumps({"machine": host, **summary, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
