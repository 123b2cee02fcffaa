"""FlexBatch against transformers' `generate` on the CPU: same demo model, same prompts, same number of new tokens, same process.

    python -m benchmark.peers --output benchmark/results/peers-cpu.json

transformers pads a batch to its longest prompt; prompts are sorted by length for it, which is the order that wastes least, and every batch size
of ``--batch-sizes`` is tried, its best one counts. FlexBatch gets the prompts as they come, everything on the gpu tier (plain memory here). Both
decode greedily in fp32 and neither may stop early, so that both generate the same number of tokens. The runs alternate, and the
least time of each counts, so that a passing disturbance of the machine favours neither.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmark.suite import machine

ROOT = Path(__file__).parents[1]
HUMANEVAL = ROOT.parent / "shared" / "data" / "humaneval.jsonl"


def read_prompts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def padded_generate(model: Any, tokenizer: Any, prompts: list[str], batch_size: int, new_tokens: int) -> tuple[list[list[int]], float]:
    """transformers: new token ids in the order of the prompts, and seconds; tokenizing and padding included."""
    import torch

    start = time.perf_counter()
    ids = tokenizer(prompts).input_ids
    order = sorted(range(len(prompts)), key=lambda index: len(ids[index]))
    results: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(order), batch_size):
        part = order[begin : begin + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[index] for index in part]}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        for index, row in zip(part, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            results[index] = row
    tokenizer.batch_decode(results)
    return results, time.perf_counter() - start


def flexbatch_generate(llm: Any, prompts: list[str], new_tokens: int) -> tuple[list[list[int]], float]:
    """FlexBatch: likewise."""
    from flexbatch import SamplingParams

    start = time.perf_counter()
    completions = llm.generate(prompts, SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True))
    return [completion.token_ids for completion in completions], time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flexbatch import LLM

    torch.set_num_threads(arguments.threads)
    prompts = read_prompts(arguments.prompts)
    folder = ROOT / "flexbatch" / "data" / "demo"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs: dict[int, list[float]] = {size: [] for size in arguments.batch_sizes}
    mine: list[float] = []
    with LLM("demo", percent=(100, 0, 100, 0, 100, 0), device="cpu", dtype="float32") as llm:
        flexbatch_generate(llm, prompts[:4], 2)
        padded_generate(reference, tokenizer, prompts[:4], 4, 2)
        for _ in range(arguments.repeats):
            tokens, seconds = flexbatch_generate(llm, prompts, arguments.new_tokens)
            mine.append(seconds)
            for size in arguments.batch_sizes:
                expected, seconds = padded_generate(reference, tokenizer, prompts, size, arguments.new_tokens)
                theirs[size].append(seconds)
                print(f"transformers, batch {size}: {seconds:.2f} s; FlexBatch: {mine[-1]:.2f} s", file=sys.stderr)
    # EOS is suppressed for transformers by min_new_tokens and passed over by FlexBatch, so rows may part where the model chose EOS.
    ended = [tokenizer.eos_token_id in row for row in tokens]
    equal = sum(mine_row == row for mine_row, row in zip(tokens, expected, strict=True))
    count = sum(map(len, tokens))
    if {len(row) for row in (*tokens, *expected)} != {arguments.new_tokens}:
        raise SystemExit("the two did not generate the same number of tokens; the ratio would mean nothing")
    best = min(theirs, key=lambda size: min(theirs[size]))
    return {
        "ratio": min(theirs[best]) / min(mine),
        "flexbatch_seconds": mine,
        "transformers_seconds": theirs,
        "transformers_best_batch_size": best,
        "flexbatch_tokens_per_second": count / min(mine),
        "transformers_tokens_per_second": count / min(theirs[best]),
        "prompts": len(prompts),
        "new_tokens_each": arguments.new_tokens,
        "equal_rows": equal,
        "rows_in_which_flexbatch_passed_over_eos": sum(ended),
        "threads": arguments.threads,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=HUMANEVAL, help="JSON lines with a field prompt (default: ../shared/data/humaneval.jsonl)")
    parser.add_argument("--new-tokens", type=int, default=64, help="new tokens for each prompt (default: 64)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 164], help="padded batch sizes that transformers may choose from")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the fastest counts (default: 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch threads (default: all cores)")
    parser.add_argument("--output", type=Path, help="JSON file with machine, versions and commit")
    arguments = parser.parse_args()
    if not arguments.prompts.is_file():
        parser.error(f"{arguments.prompts} does not exist; name a file with --prompts")
    results = measure(arguments)
    import transformers

    versions = {**machine(), "transformers": transformers.__version__, "cores": str(len(os.sched_getaffinity(0)))}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"machine": versions, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(f"FlexBatch is {results['ratio']:.2f}x as fast as transformers at its best padded batch size ({results['transformers_best_batch_size']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
