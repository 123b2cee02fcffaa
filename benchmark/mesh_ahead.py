"""Kernels of jobs on meshes, compiled by all cores before the first of them runs, each once: `benchmark.parallel
--ahead`. A run of two GPUs compiled its own for 9 to 14 of its 40 s, though four of five runs needed the same."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmark.mesh_jobs import CASES, lengths_of, llm_settings, sizes_of
from benchmark.plans_ahead import compile_not_begun, gpu_traits, mark, say
from flexbatch.config import EngineConfig
from flexbatch.execution.job import Job
from flexbatch.execution.kernels_ahead import Announced
from flexbatch.kernels.imagined_gpu import GpuTraits
from flexbatch.planner.engine_plan import EnginePlan
from flexbatch.planner.loader import planned_kernels
from flexbatch.planner.planner import Planner


def announced_by_ranks(words: dict[str, Any]) -> Iterator[Announced]:
    """What the ranks of a run announce, each kind once. words: of the run, as `benchmark.parallel` makes them."""
    case = dataclasses.replace(CASES[words["case"]], **words["job"])
    settings = llm_settings(case, words["gpu_gib"], sizes_of(words["mesh"]), words["set"])
    config = EngineConfig(model=case.model, dummy_weights=True, **settings)
    job = Job.of([(length, case.new_tokens) for length in lengths_of(case.prompts, case.prompt_tokens)], 2**20)
    found = Planner(config, job, dry=True).engine_plan
    policy, slabs = found.policy, found.weight_plan.num_slabs
    told = set()
    for rank in range(found.deployment.mesh.size):
        deployment = dataclasses.replace(found.deployment, rank=rank)
        kernels = planned_kernels(EnginePlan(deployment, policy, None, deployment.weight_plan(policy, slabs)))
        if str(kernels) not in told:
            told.add(str(kernels))
            yield kernels


def compile_for(words: dict[str, Any], traits: GpuTraits, begun: Path) -> tuple[list[Announced], int]:
    """In one of the processes; see `plans_ahead.plan_ahead`."""
    torch.set_num_threads(1)
    kernels = list(announced_by_ranks(words))
    return kernels, sum(compile_not_begun(each, traits, begun) for each in kernels)


def compile_all(wanted: dict[str, dict[str, Any]], processes: int) -> int:
    """For these runs by their names. A run whose kernels are not listed compiles them itself. Returns how many."""
    traits, started = gpu_traits(), time.perf_counter()
    if traits is None:
        say("no GPU: nothing is compiled")
        return 0
    logging.getLogger("flexbatch").setLevel(logging.WARNING)
    compiled, count, failed = [], 0, 0
    with (
        tempfile.TemporaryDirectory(prefix="flexbatch-begun-") as begun,
        ProcessPoolExecutor(processes, get_context("spawn")) as pool,
    ):
        # Of a run's kernels those that no process has begun: who comes to a run again finds what others have left.
        turns = max(2, processes // max(1, len(wanted)))
        names = {
            pool.submit(compile_for, words, traits, Path(begun)): name
            for _ in range(turns)
            for name, words in wanted.items()
        }
        for future in as_completed(names):
            try:
                kernels, number = future.result()
            except Exception as error:  # the run says so itself
                failed += 1
                say(f"{names[future]}: {type(error).__name__}: {error}"[:300])
                continue
            compiled += kernels
            count += number
    mark(compiled)
    say(f"{len(wanted)} runs, {count} kernels compiled in {processes} processes: {time.perf_counter() - started:.0f} s")
    return failed
