"""The jobs of `benchmark.expert_runs`, and their plans made in advance: each in a process of its own."""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from benchmark.shares import chosen_for_all, host_gib
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job


@dataclass(frozen=True)
class Run:
    """weight_bits is that of the engine; checkpoints in MXFP4 stay in it. memory: GiB of the gpu and of the cpu tier,
    None where the model is to lie on the GPU whole."""

    prompts: int
    weight_bits: int = 16
    cache_bits: int = 16
    memory: tuple[float, float] | None = (24, 116)


RUNS = {
    "qwen3-30b-a3b": Run(1303),
    "mixtral-8x7b": Run(509),
    "gpt-oss-120b": Run(2477, weight_bits=4),
    "glm-4.5-air": Run(653, weight_bits=4),
    "qwen3-235b-a22b": Run(293, weight_bits=4, cache_bits=4),
    "deepseek-v2-lite": Run(499, memory=None),
    "gpt-oss-20b": Run(499, weight_bits=4, memory=None),
    "olmoe-1b-7b": Run(499, memory=None),
}


def settings_of(run: Run, share: int) -> dict[str, Any]:
    """Memory."""
    if run.memory is None:
        return {}
    gpu, cpu = run.memory
    return {"gpu_memory": f"{gpu}GiB", "cpu_memory": f"{host_gib(cpu, share):.3f}GiB"}


def job_of(name: str, args: argparse.Namespace) -> tuple[EngineConfig, Job]:
    """Of all layers."""
    run, count, rows = RUNS[name], args.prompts or RUNS[name].prompts, args.prompt_tokens + args.new_tokens - 1
    bits = {"weight_bits": run.weight_bits, "cache_bits": run.cache_bits}
    whole = EngineConfig(model=name, dummy_weights=True, hardware=args.hardware, **{**bits, **settings_of(run, 1)})
    return whole, Job((rows,) * count, (args.prompt_tokens,) * count)


def plan_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a part of the layers runs by, and what the plan of all promises; as plain data."""
    begun = time.perf_counter()
    plan, settings = chosen_for_all(*job_of(name, args))
    rate = plan.predicted_tokens_per_second
    return {"settings": settings, "tokens_per_second": rate, "planned_in": round(time.perf_counter() - begun, 1)}


def write_plans(args: argparse.Namespace) -> None:
    """Of all ``args.models``; of several, each in a process of its own."""
    if len(args.models) == 1:
        made = [plan_of(args.models[0], args)]
    else:
        with ProcessPoolExecutor(len(args.models), mp_context=get_context("spawn")) as pool:
            made = list(pool.map(plan_of, args.models, [args] * len(args.models)))
    plans = dict(zip(args.models, made, strict=True))
    args.plan.write_text(json.dumps(plans), encoding="utf-8")
    for name, each in plans.items():
        print(f"{name}: planned in {each['planned_in']} s", file=sys.stderr, flush=True)
