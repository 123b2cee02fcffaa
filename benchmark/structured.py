"""What structured output costs: a job of many sequences with many schemas beside the same job without, by turns.

    python -m benchmark.structured --model demo --sequences 500 --schemas 50
    python -m benchmark.structured --model llama-3-8b --percent 0 100 0 100 100 0 --block 125 4

Every sequence follows one of the schemas of `tests.public_schemas`, and draws its tokens at temperature 1. The job
without has the same prompts and, row by row, as many tokens, so that both write the same number; it has no tokens that
come without a pass. Both run by turns, after one of each to warm up; the medians are compared. ``parts`` are
milliseconds a pass: masks computed on threads while the pass runs, and what the loop itself does for them, which is the
overhead: handing them out, waiting for them, applying them, taking in what was drawn, and tokens that had no choice.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmark.machine import publish
from benchmark.part_times import Parts, PartTimes
from flexbatch import LLM, SamplingParams, StructuredOutputsParams
from flexbatch.execution import masks, sampling
from flexbatch.execution.passes import Passes
from flexbatch.execution.sequence import Sequence
from flexbatch.policy.stdout import run_process

PARTS: Parts = {
    "masks on threads": (masks, "_prepare"),
    "hand out": (masks.MaskWorkers, "begin"),
    "wait": (masks.GrammarFollower, "_settle"),
    "read": (masks.GrammarFollower, "mask"),
    "apply": (sampling, "masked"),
    "take in": (Sequence, "_follow"),
    "without a choice": (masks.GrammarFollower, "forced"),
    "turn": (Passes, "turn"),
}
IN_LOOP = ("hand out", "read", "apply", "take in", "without a choice")
"""Parts of a turn, one beside the other; waiting is within them."""


def requests(args: argparse.Namespace) -> tuple[list[str], list[SamplingParams]]:
    from tests.public_schemas import PUBLIC

    names = list(PUBLIC)[:: max(1, len(PUBLIC) // args.schemas)][: args.schemas]
    forms = [StructuredOutputsParams(json=PUBLIC[name], disable_any_whitespace=True) for name in names]
    prompts = [f"# {names[row % len(names)]}, example {row}\n" for row in range(args.sequences)]
    params = [
        SamplingParams(temperature=1, seed=row, max_tokens=args.new_tokens, structured_outputs=forms[row % len(forms)])
        for row in range(args.sequences)
    ]
    return prompts, params


def without_forms(params: list[SamplingParams], lengths: list[int]) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=1, seed=each.seed, max_tokens=max(1, length), ignore_eos=True)
        for each, length in zip(params, lengths, strict=True)
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    prompts, constrained = requests(args)
    rows, count = args.block
    engine: dict[str, Any] = {"gpu_batch_size": rows, "num_gpu_batches": count, "dummy_weights": args.dummy_weights}
    if args.percent:
        engine["percent"] = tuple(args.percent)
    with LLM(args.model, device=args.device, **engine) as llm:
        first = llm.generate(prompts, constrained)
        plain = without_forms(constrained, [len(each.token_ids) for each in first])
        llm.generate(prompts, plain)
        runs: dict[str, list[dict[str, Any]]] = {"structured": [], "plain": []}
        for _ in range(args.rounds):
            for name, params in (("plain", plain), ("structured", constrained)):
                begun, passes = time.perf_counter(), llm.statistics.passes
                with PartTimes(PARTS, "without a choice") as times:
                    found = llm.generate(prompts, params)
                seconds, passes = time.perf_counter() - begun, llm.statistics.passes - passes
                tokens = sum(len(each.token_ids) for each in found)
                runs[name].append(
                    {"seconds": seconds, "passes": passes, "tokens": tokens, "without a pass": times.count,
                     "parts": times.per_turn()}
                )  # fmt: skip
    return summary(args, runs, sum(each.finish_reason == "stop" for each in first))


def summary(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], whole: int) -> dict[str, Any]:
    medians = {
        name: {
            "seconds": round(statistics.median(run["seconds"] for run in found), 3),
            "ms_per_pass": round(statistics.median(1e3 * run["seconds"] / run["passes"] for run in found), 3),
            **{key: found[0][key] for key in ("passes", "tokens", "without a pass")},
        }
        for name, found in runs.items()
    }
    parts = {part: round(statistics.median(run["parts"][part] for run in runs["structured"]), 3) for part in PARTS}
    in_loop = sum(parts[part] for part in IN_LOOP)
    return {
        "sequences": args.sequences,
        "schemas": args.schemas,
        "whole_answers": whole,
        "runs": medians,
        "time_ratio": round(medians["structured"]["seconds"] / medians["plain"]["seconds"], 3),
        "parts_ms_per_pass": parts,
        "overhead_ms_per_pass": round(in_loop, 3),
        "overhead_of_pass": round(in_loop / parts["turn"], 4),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dummy-weights", action="store_true", help="random weights of a public shape")
    parser.add_argument("--percent", type=float, nargs=6)
    parser.add_argument("--block", type=int, nargs=2, default=(125, 4), metavar=("ROWS", "MICRO-BATCHES"))
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--schemas", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the JSON here, too")
    args = parser.parse_args(argv)
    return publish(lambda: {"model": args.model, **measure(args)}, args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
