"""What it is worth to bring only the experts that are hit, by the number of sequences that decode: passes of a few
layers of a public model whose weights, random ones, are in host memory.

    python -m benchmark.hit_experts --output hit_experts.json

Both ways run by turns in one engine on the same prompts, twice each. "differences" says where their tokens part, if
they do, beside the margins between the two best tokens there, and where either way differs from itself. Milliseconds
are means of passes that decode, distinct experts are means of all. "copies" is the kernel alone, on a GPU: how fast
it brings so many experts of a layer.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from benchmark.machine import publish
from benchmark.observed import ObservedLLM, Unchanging
from benchmark.shares import with_layers
from flexbatch import SamplingParams
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.kernels import ops
from flexbatch.policy.shapes import SHAPES
from flexbatch.policy.stdout import run_process

EVERY_PASS = 1 << 30
"""Tokens up to which a pass brings experts by hit: however many, and 0: none."""
COPIES = 5
"""Of each number of experts."""


def opened(args: argparse.Namespace) -> ObservedLLM:
    """The engine with all weights in host memory and the cache on the GPU."""
    config = EngineConfig(
        model=with_layers(args.model, args.layers, f"{args.model}-cut"),
        dummy_weights=True,
        weight_bits=args.weight_bits,
        hardware=args.hardware,
        percent=(0, 100, 100, 0, 100, 0),
        gpu_batch_size=max(args.sequences),
        num_gpu_batches=1,
        cpu_experts=0.0,  # they round otherwise, and other ones are there from time to time
        gpu_memory=args.gpu_memory,
        cpu_memory=args.cpu_memory,
    )
    rows = args.prompt_tokens + args.new_tokens - 1
    job = Job((rows,) * max(args.sequences), (args.prompt_tokens,) * max(args.sequences))
    return cast("ObservedLLM", ObservedLLM.from_planner(Unchanging(config, job)))


def counts(llm: ObservedLLM) -> tuple[int, int]:
    """Distinct experts of all layers and passes so far, and the passes."""
    routing = llm._capacity.routing
    return (0, 0) if routing is None else (int(routing.reached.sum()), routing.passes)


@dataclass(frozen=True)
class Turn:
    """What one way gave: seconds of the mean pass that decodes, and of the job, the load of each pass, distinct
    experts, and the answers."""

    seconds: float
    job_seconds: float
    loads: list[list[float]]
    distinct: float
    answers: list[Any]

    @classmethod
    def of(cls, llm: ObservedLLM, prompts: list[dict[str, Any]], new_tokens: int, most: int) -> Turn:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, logprobs=2)
        hits = llm.weights.hit_experts
        assert hits is not None, "a model without experts in host memory"
        hits.max_tokens = most
        reached, passes = counts(llm)
        began = time.perf_counter()
        answers = llm.generate(prompts, params)
        job_seconds, log = time.perf_counter() - began, llm.pass_log
        assert log is not None
        seconds = statistics.mean(each["seconds"] for each in log.log if not each["load"][2])
        distinct = (counts(llm)[0] - reached) / (counts(llm)[1] - passes) / llm.arch.num_layers
        return cls(seconds, job_seconds, [each["load"] for each in log.log], distinct, answers)


def difference(first: Turn, second: Turn) -> dict[str, Any] | None:
    """Where the tokens of two turns part for the first time, and by how much each preferred its own to the next best;
    None where they are the same."""
    for index, (one, other) in enumerate(zip(first.answers, second.answers, strict=True)):
        for position, pair in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
            if pair[0] != pair[1]:
                margins = [margin_of(each.logprobs[position]) for each in (one, other)]
                return {"sequence": index, "position": position, "margins": margins}
    return None


def margin_of(best: dict[int, Any]) -> float:
    """Between the two best log-probabilities."""
    values = sorted((each.logprob for each in best.values()), reverse=True)
    return round(values[0] - values[1], 6) if len(values) > 1 else 0.0


def compared(llm: ObservedLLM, prompts: list[dict[str, Any]], new_tokens: int) -> dict[str, Any]:
    """Passes that decode these prompts, by both ways, twice."""
    turns = [Turn.of(llm, prompts, new_tokens, most) for most in (0, EVERY_PASS, 0, EVERY_PASS)]
    whole, by_hit = turns[::2], turns[1::2]
    return {
        "sequences": len(prompts),
        "whole_ms": round(1e3 * min(each.seconds for each in whole), 3),
        "by_hit_ms": round(1e3 * min(each.seconds for each in by_hit), 3),
        "whole_job_ms": round(1e3 * min(each.job_seconds for each in whole), 1),
        "by_hit_job_ms": round(1e3 * min(each.job_seconds for each in by_hit), 1),
        "distinct_experts": round(by_hit[0].distinct, 1),
        "differences": {
            "by_hit": difference(whole[0], by_hit[0]),
            "whole_again": difference(*whole),
            "by_hit_again": difference(*by_hit),
        },
        "same_passes": all(each.loads == turns[0].loads for each in turns),
    }


def copies(llm: ObservedLLM) -> list[dict[str, Any]]:
    """The kernel on a layer, for several numbers of experts."""
    hits, layer, rows = llm.weights.hit_experts, llm.arch.num_layers - 1, []
    assert hits is not None
    if llm.queues.device.type != "cuda":
        return rows
    parts = torch.tensor(hits.parts[layer], dtype=torch.int64).to(llm.queues.device)
    source, target = llm.weights.cpu_slabs[layer], llm.weights.slabs[0]
    for wanted in (1, hits.count // 16, hits.count // 4, hits.count):
        mask = torch.zeros(hits.count, dtype=torch.bool)
        mask[random.Random(wanted).sample(range(hits.count), max(1, wanted))] = True
        on_device = mask.to(llm.queues.device)
        num_bytes = int(((parts[:, 2] - parts[:, 1]) * on_device[parts[:, 0]]).sum())
        ops.copy_parts(source, target, parts, on_device, hits.word)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(COPIES):
            ops.copy_parts(source, target, parts, on_device, hits.word)
        last.record()
        last.synchronize()
        milliseconds = first.elapsed_time(last) / COPIES
        rate = round(num_bytes / milliseconds / 1e6, 1)
        rows.append({"experts": int(mask.sum()), "bytes": num_bytes, "ms": round(milliseconds, 3), "gb_per_s": rate})
    return rows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    chance, vocabulary = random.Random(args.model), range(10, SHAPES[args.model]["vocab_size"])
    prompts = [
        {"prompt_token_ids": chance.choices(vocabulary, k=args.prompt_tokens)} for _ in range(max(args.sequences))
    ]
    with opened(args) as llm:
        compared(llm, prompts, 3)  # compiles
        rows = [compared(llm, prompts[:count], args.new_tokens) for count in args.sequences]
        hits = llm.weights.hit_experts
        assert hits is not None
        return {
            "model": args.model,
            "layers": args.layers,
            "weight_bits": args.weight_bits,
            "layer_bytes": llm.weights.plan.layer_bytes(0, "cpu"),
            "decode": rows,
            "copies": copies(llm),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--weight-bits", type=int, default=16, choices=(16, 8, 4))
    parser.add_argument("--hardware", default="auto", help="the profile that plans are made by")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 9, 18, 32, 64])
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--gpu-memory", default="12GiB")
    parser.add_argument("--cpu-memory", default="16GiB")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    return publish(lambda: measure(args), args.output)


if __name__ == "__main__":
    sys.exit(run_process(main))
