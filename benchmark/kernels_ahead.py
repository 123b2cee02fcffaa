"""The kernels of settings, compiled before these run: several settings at a time, each with two layers of its model.

A kernel is compiled for widths, bits and block sizes, which do not depend on the number of layers, and lies in Triton's
cache on the disk then. On a fresh machine 10 to 15 s of every setting were the compiler's, one core of sixteen.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from benchmark.observed import open_engine, warm_up
from benchmark.policy_settings import Setting

LAYERS = 2


def run_few_layers(setting: Setting, hardware: str, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """A block's prompts through two layers of the model, in the block that is planned for all of them; what was
    compiled."""
    import torch

    torch.set_num_threads(2)
    few = dataclasses.replace(setting, layers=LAYERS)
    with open_engine(few, hardware, dict(fixed)) as llm:
        warm_up(llm, few)
        found: dict[str, Any] = llm.report()["set_up"]
        return found


def compile_ahead(
    settings: Mapping[str, Setting], plans: Mapping[str, Mapping[str, Any]], hardware: str, processes: int
) -> None:
    """Those that have a plan. A setting that fails does so again in its run, which tells more."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = {
            pool.submit(run_few_layers, setting, hardware, plans[name]): name
            for name, setting in settings.items()
            if name in plans
        }
        for future in as_completed(futures):
            error = future.exception()
            told = error if error is not None else future.result().get("compiled_kernels", "nothing compiled")
            print(f"{futures[future]}: {told}"[:300], file=sys.stderr, flush=True)
