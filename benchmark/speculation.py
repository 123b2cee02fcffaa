"""Speculation on the CPU, with the bundled demo pair or another model: the engine's own plain decoding and speculation
by turns, in the same engine.

    python -m benchmark.speculation --prompts humaneval.jsonl --output benchmark/results/speculation-cpu.json
    python -m benchmark.speculation --model smollm2 --draft ngram --placements auto --batches 0 --gen-len 128 \
        --prompts docs --chat "Summarize this text in three sentences." \
        --output benchmark/results/speculation-smollm2.json

``--placements auto`` gives no placement, and ``--batches 0`` no block, so that the planner chooses them. ``--chat``
makes chats of the prompts, this sentence before each, whose answers end where the model ends them; elsewhere EOS is
ignored.
Prompts are JSON lines, or a folder of Markdown files, of which every section of 150 to 600 words is one.

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
import re
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
from flexbatch.text.prompts import Prompt

PLACEMENTS = {
    "gpu": (100, 0, 100, 0, 100, 0),
    "cpu": (0, 100, 0, 100, 100, 0),
    "disk": (0, 0, 100, 0, 100, 0),
    "auto": None,
}
"""Where the weights are; the cache is on the gpu tier, with weights on the cpu tier there too."""
SECTION_WORDS = (150, 600)


def read_prompts(path: Path) -> list[str]:
    if not path.is_dir():
        return [json.loads(line)["prompt"] for line in path.read_text().splitlines() if line.strip()]
    texts = [file.read_text() for file in sorted(path.glob("*.md"))]
    sections = [section.strip() for text in texts for section in re.split(r"(?m)^(?=##? )", text)]
    return [section for section in sections if SECTION_WORDS[0] <= len(section.split()) <= SECTION_WORDS[1]]


def as_chats(prompts: list[str], request: str | None) -> list[Prompt]:
    if request is None:
        return list(prompts)
    return [[{"role": "user", "content": f"{request}\n\n{prompt}"}] for prompt in prompts]


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
    arguments: argparse.Namespace, placement: str, batch: int, tree: str, prompts: list[Prompt], jobs: int
) -> dict[str, Any]:
    """``jobs`` jobs of ``batch`` prompts each in one engine; with a block that is chosen, all prompts are one job."""
    chat, gen_len, temperature = arguments.chat, arguments.gen_len, arguments.temperature
    params = SamplingParams(max_tokens=gen_len, temperature=temperature, ignore_eos=chat is None, seed=1)
    source = itertools.cycle(prompts)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"gpu_memory": "4GiB", "cpu_memory": "1GiB", "device": "cpu"}
        if PLACEMENTS[placement] is not None:
            settings["percent"] = PLACEMENTS[placement]
        if batch:
            settings |= {"gpu_batch_size": batch, "num_gpu_batches": 1}
        settings |= {"draft": tuple(arguments.draft), "tree": tree, "compare_plain": True, "offload_dir": folder}
        with LLM(arguments.model, **settings) as llm:
            work = [list(itertools.islice(source, batch)) for _ in range(jobs)] if batch else [prompts]
            llm.prepare([prompt for job in work for prompt in job], params)
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
        "model": arguments.model,
        "prompts": arguments.prompts.name,
        "chat": chat,
        "weights": placement,
        "batch": batch,
        "gen_len": gen_len,
        "jobs": len(ratios),
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
        "prompts",
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
        f"| {result['prompts']} | {result['weights']} | {result['batch'] or 'auto'} | {result['tree']} "
        f"| {result['jobs']} | {speeds} | {spread} "
        f"| {shares} | {accepted} |"
    )


def document(report: dict[str, Any], name: str) -> str:
    """The table with what is needed to make it again. name: of the JSON file."""
    host = report["machine"]
    commits = ", ".join(sorted({result["commit"][:7] for result in report["results"]}))
    lengths = ", ".join(sorted({str(result["gen_len"]) for result in report["results"]}))
    threads = ", ".join(sorted({str(result["threads"]) for result in report["results"]}))
    drafts = ", ".join(sorted({" + ".join(result["drafts"]) for result in report["results"]}))
    models = ", ".join(sorted({result["model"] for result in report["results"]}))
    requests = sorted({str(result["chat"]) for result in report["results"]} - {"None"})
    ends = f'as chats ("{chr(34).join(requests)}"), to their end' if requests else "EOS ignored"
    return f"""# Speculation on the CPU: {models} and {drafts}

{host["date"]}; {host["cpu"]}, {host["cpus"]} cores, {threads} thread(s) of torch, torch {host["torch"]}, Python \
{host["python"]}, commit {commits}. Numbers in
[{name}]({name}). {lengths} new tokens each, greedy, {ends}. The \
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
        tuple(str(row[name]) for name in ("model", "prompts", "weights", "batch", "tree", "drafts", "temperature")): row
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
    output.with_suffix(".md").write_text(document(report, output.name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a prompt each, or a folder")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--chat", metavar="REQUEST", help="what to ask before every prompt, in a chat")
    parser.add_argument("--most-prompts", type=int, help="of the file or folder")
    parser.add_argument("--draft", nargs="+", default=["demo-draft"])
    parser.add_argument("--trees", nargs="+", default=["auto"])
    parser.add_argument(
        "--placements", nargs="+", default=["gpu", "disk"], choices=list(PLACEMENTS), help="where the weights are"
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
        prompts = as_chats(read_prompts(arguments.prompts)[: arguments.most_prompts], arguments.chat)
        command = f"python -m benchmark.speculation {shlex.join(sys.argv[1:])}"
        results: list[dict[str, Any]] = []
        print(HEADER, file=data)
        for placement, batch, tree in itertools.product(arguments.placements, arguments.batches, arguments.trees):
            jobs = max(arguments.jobs, arguments.tokens // (max(1, batch) * arguments.gen_len))
            with noise(arguments.noise):
                result = measure(arguments, placement, batch, tree, prompts, jobs)
            results.append({**result, "noise_processes": arguments.noise, "command": command})
            print(row(results[-1]), file=data, flush=True)
            if arguments.output:
                write(arguments.output, results)
        return 0


if __name__ == "__main__":
    raise SystemExit(run_process(main))
