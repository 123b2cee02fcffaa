"""A process that loads with 8 bits, says so and has files for the next start written beside its job, slowly: tests kill
it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from flexbatch.memory import files
from flexbatch.memory.loading import Loader
from flexbatch.memory.weight_plan import WeightPlan, plan_weights
from flexbatch.memory.weights import WeightStore
from flexbatch.policy.policy import Split
from tests.memory.rigs import open_tiers, pieces, tiny_arch

ARCH = tiny_arch(3, hidden_size=64, intermediate_size=700)


def plan() -> WeightPlan:
    return plan_weights(ARCH, Split(0.6, 0.4), 8, 8, 4)


def main(folder: str) -> int:
    write = files.DiskFile.write

    def slow(file: files.DiskFile, buffer: Tensor, offset: int) -> None:
        time.sleep(0.02)
        write(file, buffer[: len(buffer) // 2], offset)
        time.sleep(0.02)
        write(file, buffer[len(buffer) // 2 :], offset + len(buffer) // 2)

    files.DiskFile.write = slow  # type: ignore[method-assign]
    with open_tiers(Path(folder)) as (tiers, queues):
        store = WeightStore(plan(), tiers, queues, torch.float32)
        loader = Loader(store, Path(folder) / "model", cache_quantized=True, threads=3, beside_job=True)
        loader.load(lambda skip: pieces(ARCH))
        print("ready", file=sys.stderr, flush=True)
        loader.close()
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
