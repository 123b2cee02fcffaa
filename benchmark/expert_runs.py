"""Whole jobs of public mixtures of experts with random weights, by the plan that the engine chooses.

    python -m benchmark.expert_runs qwen3-30b-a3b mixtral-8x7b --hardware machine.json --output runs.jsonl
    python -m benchmark.expert_runs gpt-oss-120b --share 4

``--share N`` runs one N-th of the layers in one N-th of the memory, where the whole does not fit the time: a layer's
bytes and products are those of the model, and tokens per second are N times those of the whole but for the embedding,
the head and what a pass costs at all. Such rows say so. Every job is prompts of random tokens, all different, 512 each
and 128 new ones, of a prime number; the first passes of another job warm up.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.machine import machine
from flexbatch import LLM, SamplingParams
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.stdout import data_apart, run_process
from flexbatch.policy.units import GIB

WORKSPACE_GIB = 1.5
"""Of the GPU, whatever the number of layers."""


@dataclass(frozen=True)
class Run:
    """weight_bits is that of the engine; checkpoints in MXFP4 stay in it. memory: GiB of the gpu and of the cpu tier,
    None where the model is to lie on the GPU whole."""

    prompts: int
    weight_bits: int = 16
    cache_bits: int = 16
    memory: tuple[float, float] | None = (24, 116)


RUNS = {
    "qwen3-30b-a3b": Run(1709),
    "mixtral-8x7b": Run(1087),
    "gpt-oss-120b": Run(1601, weight_bits=4),
    "glm-4.5-air": Run(661, weight_bits=4),
    "qwen3-235b-a22b": Run(331, weight_bits=4, cache_bits=4),
    "deepseek-v2-lite": Run(499, memory=None),
    "gpt-oss-20b": Run(499, weight_bits=4, memory=None),
    "olmoe-1b-7b": Run(499, memory=None),
}


def settings_of(run: Run, config: dict[str, Any], share: int) -> dict[str, Any]:
    if run.memory is None:
        return {}
    tables = (1 if config.get("tie_word_embeddings") else 2) * config["vocab_size"] * config["hidden_size"] * 2
    fixed = tables / GIB + WORKSPACE_GIB
    gpu, cpu = run.memory
    return {"gpu_memory": f"{fixed + (gpu - fixed) / share:.3f}GiB", "cpu_memory": f"{cpu / share:.3f}GiB"}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    run, config = RUNS[name], dict(SHAPES[name])
    layers, chance = config["num_hidden_layers"], random.Random(name)
    kept = -(-layers // args.share)
    if args.share > 1:
        SHAPES[f"{name}-cut"] = {**config, "num_hidden_layers": kept}
    count = args.prompts or run.prompts

    def job() -> list[dict[str, Any]]:
        ids = range(10, config["vocab_size"])
        return [{"prompt_token_ids": chance.choices(ids, k=args.prompt_tokens)} for _ in range(count)]

    params = SamplingParams(max_tokens=args.new_tokens, temperature=0.0, ignore_eos=True)
    begun = time.perf_counter()
    with LLM(
        f"{name}-cut" if args.share > 1 else name,
        dummy_weights=True,
        weight_bits=run.weight_bits,
        cache_bits=run.cache_bits,
        hardware=args.hardware,
        **settings_of(run, config, args.share),
    ) as llm:
        llm.prepare(job(), params)
        ready = time.perf_counter() - begun
        print(f"{name}: ready in {ready:.1f} s; {llm.policy}", file=sys.stderr, flush=True)
        few = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        llm.generate(job()[: min(count, llm.policy.block_size)], few)
        if all(split.gpu == 1 for split in (llm.policy.weights, llm.policy.cache)):
            llm.generate(job(), params)
        print(f"{name}: warm after {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
        prompts = job()
        began = time.perf_counter()
        llm.generate(prompts, params)
        seconds = time.perf_counter() - began
        rate = count * args.new_tokens / seconds
        return {
            "model": name,
            "layers": kept,
            "of_layers": layers,
            "weight_bits": run.weight_bits,
            "cache_bits": run.cache_bits,
            **{key: getattr(args, key) for key in ("prompt_tokens", "new_tokens")},
            "prompts": count,
            "ready_seconds": round(ready, 1),
            "seconds": round(seconds, 2),
            "tokens_per_second": round(rate, 1),
            "tokens_per_second_of_all_layers": round(rate * kept / layers, 1),
            **told_by(llm),
        }


def told_by(llm: LLM) -> dict[str, Any]:
    """The plan, and what was routed where."""
    plan = llm.engine_plan.plan
    return {
        "block": llm.policy.block_size,
        "micro_batches": llm.policy.num_gpu_batches,
        "percent": [round(each, 1) for each in llm.policy.percent],
        "predicted_tokens_per_second": round(plan.predicted_tokens_per_second, 1),
        "experts": llm.report().get("experts"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(RUNS))
    parser.add_argument("--hardware", default="auto", help="the profile that plans are made by")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="run one N-th of the layers and the memory")
    parser.add_argument("--prompts", type=int, help="instead of the run's own number")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, help="JSON lines, appended to")
    args = parser.parse_args()
    with data_apart() as stdout:
        for name in args.models:
            row = json.dumps({**measure(name, args), "machine": machine()})
            print(row, file=stdout, flush=True)
            if args.output is not None:
                with args.output.open("a", encoding="utf-8") as stream:
                    stream.write(row + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_process(main))
