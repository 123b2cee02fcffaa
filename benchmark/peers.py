"""FlexBatch against transformers' `generate` on the CPU: same demo model, same prompts, same number of new tokens, same
process.

    python -m benchmark.peers --prompts humaneval.jsonl --output benchmark/results/peers-cpu.json

transformers pads a batch to its longest prompt; prompts are sorted by length for it, which is the order that wastes
least, and every batch size of ``--batch-sizes`` is tried, its best one counts. FlexBatch gets the prompts as they
come, everything on the gpu tier (plain memory here). Both tokenize, decode greedily in fp32, neither stops at EOS,
and detokenize. The runs alternate, and the least time of each counts, so that a passing disturbance of the machine
favors neither. ``cpu_ratio`` compares processor seconds likewise: it stays meaningful where other work shares the
cores. ``equal_rows`` counts the prompts whose tokens are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.machine import machine
from flexbatch.policy.stdout import data_apart, run_process

ROOT = Path(__file__).parents[1]


def read_prompts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


@dataclass(frozen=True)
class Run:
    """New token ids in the order of the prompts; wall-clock and processor seconds, tokenizing included."""

    tokens: list[list[int]]
    seconds: float
    cpu_seconds: float


def timed(name: str, generate: Callable[[], list[list[int]]]) -> Run:
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens = generate()
    done = Run(tokens, time.perf_counter() - start, time.process_time() - cpu_start)
    print(f"{name}: {done.seconds:.2f} s, {done.cpu_seconds:.2f} processor seconds", file=sys.stderr, flush=True)
    return done


def padded_generate(
    model: Any, tokenizer: Any, prompts: list[str], batch_size: int, new_tokens: int
) -> list[list[int]]:
    """transformers: sorted by length, padded left to the longest of each batch."""
    import torch

    ids = tokenizer(prompts).input_ids
    order = sorted(range(len(prompts)), key=lambda index: len(ids[index]))
    results: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(order), batch_size):
        part = order[begin : begin + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[index] for index in part]}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
        for index, row in zip(part, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            results[index] = row
    tokenizer.batch_decode(results)
    return results


def flexbatch_generate(llm: Any, prompts: list[str], new_tokens: int) -> list[list[int]]:
    from flexbatch import SamplingParams

    completions = llm.generate(prompts, SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True))
    return [completion.token_ids for completion in completions]


def alternate(
    arguments: argparse.Namespace, prompts: list[str], tokenizer: Any, reference: Any
) -> tuple[list[Run], dict[int, list[Run]]]:
    """The runs of FlexBatch, and those of transformers by batch size."""
    from flexbatch import LLM

    mine: list[Run] = []
    theirs: dict[int, list[Run]] = {size: [] for size in arguments.batch_sizes}
    count = arguments.new_tokens
    with LLM("demo", percent=(100, 0, 100, 0, 100, 0), device="cpu", dtype="float32") as llm:
        flexbatch_generate(llm, prompts[:4], 2)
        padded_generate(reference, tokenizer, prompts[:4], 4, 2)
        for _ in range(arguments.repeats):
            mine.append(timed("FlexBatch", lambda: flexbatch_generate(llm, prompts, count)))
            for size, runs in theirs.items():
                runs.append(
                    timed(
                        f"transformers, batch {size}",
                        lambda size=size: padded_generate(reference, tokenizer, prompts, size, count),
                    )
                )  # type: ignore[misc]
    return mine, theirs


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    prompts = read_prompts(arguments.prompts)[: arguments.num_prompts]
    folder = ROOT / "flexbatch" / "data" / "demo"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mine, theirs = alternate(
        arguments, prompts, tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    )
    tokens, expected = mine[0].tokens, next(iter(theirs.values()))[0].tokens
    if {len(row) for row in (*tokens, *expected)} != {arguments.new_tokens}:
        raise SystemExit("the two did not generate the same number of tokens; the ratio would mean nothing")
    least = min(run.seconds for run in mine)
    best, best_seconds = min(
        ((size, min(run.seconds for run in runs)) for size, runs in theirs.items()), key=lambda pair: pair[1]
    )
    count = len(prompts) * arguments.new_tokens
    return {
        "ratio": best_seconds / least,
        "cpu_ratio": min(run.cpu_seconds for runs in theirs.values() for run in runs)
        / min(run.cpu_seconds for run in mine),
        "flexbatch_seconds": [run.seconds for run in mine],
        "flexbatch_cpu_seconds": [run.cpu_seconds for run in mine],
        "transformers_seconds": {size: [run.seconds for run in runs] for size, runs in theirs.items()},
        "transformers_cpu_seconds": {size: [run.cpu_seconds for run in runs] for size, runs in theirs.items()},
        "transformers_best_batch_size": best,
        "flexbatch_tokens_per_second": count / least,
        "transformers_tokens_per_second": count / best_seconds,
        "prompts": len(prompts),
        "new_tokens_each": arguments.new_tokens,
        "equal_rows": sum(row == other for row, other in zip(tokens, expected, strict=True)),
        "threads": arguments.threads,
        "load_average": os.getloadavg()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompts", type=Path, required=True, help="JSON lines with a field prompt, such as those of HumanEval"
    )
    parser.add_argument("--num-prompts", type=int, help="only the first prompts (for a quick look)")
    parser.add_argument("--new-tokens", type=int, default=64, help="new tokens for each prompt (default: 64)")
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=[8, 16, 32, 64, 164],
        help="padded batch sizes that transformers may choose from",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the fastest counts (default: 3)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch threads (default: all cores)"
    )
    parser.add_argument("--output", type=Path, help="JSON file with machine, versions and commit")
    arguments = parser.parse_args()
    with data_apart() as data:
        if not arguments.prompts.is_file():
            parser.error(f"{arguments.prompts} does not exist; name a file with --prompts")
        results = measure(arguments)
        import transformers

        versions = {**machine(), "transformers": transformers.__version__, "cores": str(len(os.sched_getaffinity(0)))}
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(
                json.dumps({"machine": versions, "results": results}, indent=1) + "\n", encoding="utf-8"
            )
        size, ratio, cpu_ratio = results["transformers_best_batch_size"], results["ratio"], results["cpu_ratio"]
        print(
            f"FlexBatch is {ratio:.2f}x as fast as transformers at its best padded batch size, {size}; by processor "
            f"seconds {cpu_ratio:.2f}x",
            file=data,
        )
        return 0


if __name__ == "__main__":
    sys.exit(run_process(main))
