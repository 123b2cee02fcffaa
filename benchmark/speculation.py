"""Speculation with the bundled demo pair on the CPU: the engine's own plain decoding and speculation by turns, in the
same engine.

    python -m benchmark.speculation --prompts humaneval.jsonl --output benchmark/results/speculation-cpu.json

Every job runs with trees and without by turns (`compare_plain`), no turn finding the prompts of another one in the
cache. The ratio is of the sums over all jobs, those in which costs and acceptance are still unknown included. With
``--noise N``, N processes keep a core busy at random times, as other users of a machine do. A table is written next
to the JSON file. Rows of other settings that the file holds are kept, so that a long table can be
measured in parts.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import multiprocessing
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmark.machine import machine, processor_names
from benchmark.suite import speculation_of
from flexbatch import LLM, SamplingParams
from flexbatch.policy.stdout import data_apart, run_process

PLACES = {"gpu": (100, 0, 100, 0, 100, 0), "cpu": (0, 100, 0, 100, 100, 0), "disk": (0, 0, 100, 0, 100, 0)}
"""Where the weights are; the cache is on the gpu tier, with weights on the cpu tier there too."""


def read_prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines() if line.strip()]


def make_noise(seed: int) -> None:
    """Keep a core busy for 20 ms to 2 s, again and again, with pauses as long. Ends with its parent."""
    generator, parent = random.Random(seed), os.getppid()
    while os.getppid() == parent:
        end = time.monotonic() + 0.02 * 100 ** generator.random()
        while time.monotonic() < end:
            pass
        time.sleep(0.02 * 100 ** generator.random())


@contextlib.contextmanager
def noise(processes: int) -> Iterator[None]:
    """Other users of the machine, while the body runs."""
    others = [multiprocessing.get_context("spawn").Process(target=make_noise, args=(i,)) for i in range(processes)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def measure(
    place: str, batch: int, tree: str, draft: list[str], prompts: list[str], gen_len: int, jobs: int, temperature: float
) -> dict[str, Any]:
    """``jobs`` jobs of ``batch`` prompts each in one engine."""
    params = SamplingParams(max_tokens=gen_len, temperature=temperature, ignore_eos=True, seed=1)
    source = itertools.cycle(prompts)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "percent": PLACES[place],
            "gpu_batch_size": batch,
            "num_gpu_batches": 1,
            "gpu_memory": "4GiB",
            "cpu_memory": "1GiB",
            "device": "cpu",
        }
        with LLM("demo", draft=tuple(draft), tree=tree, compare_plain=True, offload_dir=folder, **settings) as llm:
            work = [list(itertools.islice(source, batch)) for _ in range(jobs)]
            llm.prepare([prompt for job in work for prompt in job][: batch * jobs], params)
            start = llm.report()
            for job in work:
                before = llm.report()
                llm.generate(job, params)
                after = llm.report()
                ratios.append(speculation_of(before["speculation"], after["speculation"])["speed_up"])
            report = llm.report()
    tokens = report["generated_tokens"] - start["generated_tokens"]
    result = speculation_of(start["speculation"], report["speculation"])
    return {
        "commit": machine()["commit"],
        "threads": torch.get_num_threads(),
        "weights": place,
        "batch": batch,
        "gen_len": gen_len,
        "jobs": jobs,
        "temperature": temperature,
        "tokens_per_second": tokens / report["seconds"],
        "tokens_per_sequence_pass": result["emitted_tokens"] / result["sequence_passes"],
        "draft_share_of_time": result["draft_seconds"] / (result["draft_seconds"] + result["pass_seconds"]),
        "speed_up_by_job": ratios,
        "median_speed_up": statistics.median(ratios),
        **result,
    }


COLUMNS = (
    *(
        "weights",
        "batch",
        "tree",
        "jobs",
        "plain tok/s",
        "with trees tok/s",
        "ratio",
        "median of jobs (least to most)",
        "tokens a pass",
        "drafting",
    ),
    "first child accepted at depth 1, 2, ...",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def row(result: dict[str, Any]) -> str:
    """One line of the table."""
    by_job = result["speed_up_by_job"]
    speeds = (
        f"{result['plain_tokens_per_second']:.4g} | {result['tokens_per_second']:.4g} | **{result['speed_up']:.2f}**"
    )
    spread = f"{result['median_speed_up']:.2f} ({min(by_job):.2f} to {max(by_job):.2f})"
    shares = f"{result['tokens_per_sequence_pass']:.2f} | {result['draft_share_of_time']:.0%}"
    (group,) = result["acceptance"].values()
    accepted = " ".join(f"{depth[0]:.2f}" for depth in group["by_position"] if depth[0] is not None)
    return (
        f"| {result['weights']} | {result['batch']} | {result['tree']} | {result['jobs']} | {speeds} | {spread} "
        f"| {shares} | {accepted} |"
    )


def document(report: dict[str, Any]) -> str:
    """The table with what is needed to make it again."""
    host = report["machine"]
    commits = ", ".join(sorted({result["commit"][:7] for result in report["results"]}))
    lengths = ", ".join(sorted({str(result["gen_len"]) for result in report["results"]}))
    threads = ", ".join(sorted({str(result["threads"]) for result in report["results"]}))
    drafts = ", ".join(sorted({" + ".join(result["drafts"]) for result in report["results"]}))
    return f"""# Speculation on the CPU: demo and {drafts}

{host["date"]}; {host["cpu"]}, {host["cpus"]} cores, {threads} thread(s) of torch, torch {host["torch"]}, Python \
{host["python"]}, commit {commits}. Numbers in
[speculation-cpu.json](speculation-cpu.json). HumanEval prompts, {lengths} new tokens each, greedy, EOS ignored. The \
cache is on the gpu tier, which on the
CPU is plain memory with a budget; `gpu` weights lie there too, `disk` weights are read in every pass. Every job runs \
with trees and without by turns in the same
engine; the ratio is of the summed seconds of all jobs, exploration included.

{chr(10).join([HEADER, *map(row, report["results"])])}

Made by

{chr(10).join(f"    {command}" for command in dict.fromkeys(result["command"] for result in report["results"]))}
"""


def write(output: Path, results: list[dict[str, Any]]) -> None:
    """JSON and table; earlier rows of other settings are kept."""
    kept = json.loads(output.read_text())["results"] if output.exists() else []
    rows = {
        tuple(str(row[name]) for name in ("weights", "batch", "tree", "drafts", "temperature")): row
        for row in [*kept, *results]
    }
    ratios = [row["speed_up"] for row in rows.values()]
    cpu = next(iter(processor_names()), platform.machine())
    host = {**machine(), "date": f"{datetime.date.today()}", "cpu": cpu, "cpus": os.cpu_count()}
    report = {
        "machine": host,
        "lowest_ratio": min(ratios),
        "median_ratio": statistics.median(ratios),
        "results": list(rows.values()),
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(document(report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a prompt each")
    parser.add_argument("--draft", nargs="+", default=["demo-draft"])
    parser.add_argument("--trees", nargs="+", default=["auto"])
    parser.add_argument(
        "--places", nargs="+", default=["gpu", "disk"], choices=list(PLACES), help="where the weights are"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--gen-len", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096, help="generated in every row, about")
    parser.add_argument("--jobs", type=int, default=8, help="of every row, at least")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of torch; with several, whatever else runs on the machine stalls small operations",
    )
    parser.add_argument("--noise", type=int, default=0, metavar="N", help="processes that keep cores busy at times")
    parser.add_argument("--output", type=Path, help="JSON file; a table is written next to it")
    arguments = parser.parse_args()
    with data_apart() as data:
        torch.set_num_threads(arguments.threads)
        prompts = read_prompts(arguments.prompts)
        command = f"python -m benchmark.speculation {shlex.join(sys.argv[1:])}"
        results: list[dict[str, Any]] = []
        print(HEADER, file=data)
        for place, batch, tree in itertools.product(arguments.places, arguments.batches, arguments.trees):
            jobs = max(arguments.jobs, arguments.tokens // (batch * arguments.gen_len))
            with noise(arguments.noise):
                result = measure(
                    place, batch, tree, arguments.draft, prompts, arguments.gen_len, jobs, arguments.temperature
                )
            results.append({**result, "noise_processes": arguments.noise, "command": command})
            print(row(results[-1]), file=data, flush=True)
            if arguments.output:
                write(arguments.output, results)
        return 0


if __name__ == "__main__":
    raise SystemExit(run_process(main))
