"""Plans of settings, and the kernels that their passes will launch, made by processes that import once.

A run of a setting lists and compiles its kernels by itself, which took it 10 to 18 s on an H200's host with another job
beside it, of 25 s for a job of 7. Here all cores do so for all settings before the first of them runs: each kernel
once, whichever settings need it. A run then finds the file beside Triton's cache that says that its kernels are there,
and starts no compiler (`execution.kernels_ahead`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmark.observed import Unchanging, chosen_here, job_of
from benchmark.policy_settings import Setting
from flexbatch.config import EngineConfig
from flexbatch.execution.kernels_ahead import Announced, listed, marker_of
from flexbatch.kernels.imagined_gpu import GpuTraits, Launch
from flexbatch.kernels.launchers_ahead import DriverOfTriton
from flexbatch.planner.loader import planned_kernels

NOT_SETTINGS = ("predicted_tokens_per_second", "predicted_seconds")
"""Of a plan: what was predicted, and not a setting of `LLM`."""


@dataclass(frozen=True)
class PlanAhead:
    """A setting's plan, and the kernels that its run announces; none without a GPU, or where they were not compiled."""

    plan: dict[str, Any]
    kernels: Announced | None = None
    compiled: int = 0
    """Of them by this process."""
    error: str = ""
    """Why they were not."""


def settings_in(plan: dict[str, Any]) -> dict[str, Any]:
    """What leaves nothing to choose."""
    return {key: value for key, value in plan.items() if key not in NOT_SETTINGS}


def announced_by(setting: Setting, hardware: str, fixed: dict[str, Any]) -> Announced:
    """What a run of the setting by a plan announces."""
    config = EngineConfig(model=setting.shape, hardware=hardware, **{**setting.llm_settings, **fixed})
    return planned_kernels(Unchanging(config, job_of(setting), dry=True).engine_plan)


def plan_ahead(setting: Setting, hardware: str, traits: GpuTraits | None, begun: Path) -> PlanAhead:
    """In one of the processes. traits: of the GPU, where there is one. begun: a folder that the processes share; who
    makes a kernel's file there compiles it."""
    plan = chosen_here(setting, hardware)
    if traits is None:
        return PlanAhead(plan)
    try:
        kernels = announced_by(setting, hardware, settings_in(plan))
        return PlanAhead(plan, kernels, compile_not_begun(kernels, traits, begun))
    except Exception as error:  # the run compiles them itself then
        return PlanAhead(plan, error=f"{type(error).__name__}: {error}"[:300])


def compile_not_begun(kernels: Announced, traits: GpuTraits, begun: Path) -> int:
    """Those that no process has begun, the longest first. Returns how many."""
    torch.set_num_threads(1)
    launches = [DriverOfTriton(traits.backend), *listed(kernels, traits)]
    count = 0
    for launch in sorted(launches, key=lambda each: each.weight, reverse=True):
        try:
            (begun / name_of(launch)).touch(exist_ok=False)
        except FileExistsError:
            continue
        count += 1
        with contextlib.suppress(Exception):  # one that cannot be compiled says so where it is launched, if it ever is
            launch.compile()
    return count


def name_of(launch: Launch | DriverOfTriton) -> str:
    """The same of launches that are equal, in any process."""
    told = (launch.name, launch.forms, launch.options) if isinstance(launch, Launch) else launch.backend
    return hashlib.sha256(repr(told).encode()).hexdigest()


def gpu_traits() -> GpuTraits | None:
    return GpuTraits.of(torch.device("cuda", 0)) if torch.cuda.is_available() else None


def write_plans(path: Path, settings: dict[str, Setting], hardware: str, processes: int) -> int:
    """Plans of the settings, and of those that have none why. Returns how many have none."""
    plans, refused, started = json.loads(path.read_text()) if path.is_file() else {}, 0, time.perf_counter()
    compiled: list[Announced] = []
    count, traits, broken = 0, gpu_traits(), False
    with (
        tempfile.TemporaryDirectory(prefix="flexbatch-begun-") as begun,
        ProcessPoolExecutor(processes, get_context("spawn")) as pool,
    ):
        names = {
            pool.submit(plan_ahead, setting, hardware, traits, Path(begun)): name for name, setting in settings.items()
        }
        for future in as_completed(names):
            name = names[future]
            try:
                found = future.result()
            except Exception as error:  # the others are planned all the same; this one is refused again in its run
                refused += 1
                broken |= isinstance(error, BrokenExecutor)
                say(f"{name}: {type(error).__name__}: {error}"[:300])
                continue
            plans[name] = found.plan
            path.write_text(json.dumps(plans, indent=1) + "\n")
            count += found.compiled
            compiled += [] if found.kernels is None else [found.kernels]
            rate, seconds = (found.plan[each] for each in NOT_SETTINGS)
            failed = f"; kernels: {found.error}" if found.error else ""
            say(f"{name}: {rate:.1f} tok/s, {seconds:.1f} s predicted{failed}")
    if not broken:  # only now are those compiled that another process had begun
        mark(compiled)
    took = time.perf_counter() - started
    say(f"{len(settings)} plans, {count} kernels compiled in {processes} processes: {took:.0f} s")
    return refused


def mark(compiled: Iterable[Announced]) -> None:
    """Have runs know that these kernels are there."""
    for kernels in compiled:
        if (marker := marker_of(torch.device("cuda", 0), kernels)) is not None:
            with contextlib.suppress(OSError):
                marker.touch()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
