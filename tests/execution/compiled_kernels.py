"""``python -m tests.execution.compiled_kernels FOLDER``: kernels of a GPU that is not there, compiled ahead twice, by a
process in which Triton compiles. What was done, said and written is told as JSON."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from flexbatch.execution import kernels_ahead
from flexbatch.execution.kernels_ahead import Announced, Compiled, compiled_ahead
from flexbatch.execution.left_out import LEFT_OUT
from flexbatch.kernels.imagined_gpu import GpuTraits

GPU, TRAITS = torch.device("cuda", 0), GpuTraits(90, 132, 232448)


def norms(widths: tuple[int, ...]) -> None:
    from flexbatch.kernels import ops
    from flexbatch.kernels.imagined_gpu import DEVICE

    for width in widths:
        x = torch.empty(4, width, dtype=torch.bfloat16, device=DEVICE)
        ops.rms_norm(x + x, x[0], 1e-5)


def main(folder: Path) -> None:
    from triton import knobs

    knobs.cache.dir = str(folder)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flexbatch").addHandler(handler)
    logging.getLogger("flexbatch").setLevel(logging.INFO)
    GpuTraits.of = classmethod(lambda cls, device: TRAITS)  # type: ignore[method-assign, assignment]
    kernels_ahead.usable_processors = lambda: 4
    kernels_ahead.SAID_SECONDS, kernels_ahead.LIMIT_SECONDS, kernels_ahead.LISTING_SECONDS = 0.0, 300.0, 300.0
    done: list[Compiled] = []
    for _ in range(2):
        with compiled_ahead(GPU, Announced(norms, (512, 1024, 2048)), done.append):
            pass
    files = len(list(folder.rglob("*.cubin")))
    imported = [name for name in LEFT_OUT if name in sys.modules]
    print(json.dumps({"done": [asdict(each) for each in done], "said": said, "files": files, "imported": imported}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
