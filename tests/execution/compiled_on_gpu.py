"""``python -m tests.execution.compiled_on_gpu``: kernels are compiled ahead by children of a process that uses its GPU,
whose pinned memory is written and copied meanwhile. What became of both is told as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from flexbatch.execution.kernels_ahead import Announced, Compiled, compiled_ahead
from flexbatch.kernels import ops, reference
from flexbatch.memory.tiers import HostArena
from tests.execution.compiled_kernels import norms

WIDTHS, COPIES = (512, 1024, 2048), 200


def main() -> None:
    from triton import knobs

    device = torch.device("cuda", 0)
    x = torch.randn(4, WIDTHS[-1], device=device).bfloat16()
    arena, own = HostArena(64 << 20, pinned=True), torch.zeros(64 << 20, dtype=torch.uint8, pin_memory=True)
    near, wrong = torch.empty_like(own, device=device), 0
    done: list[Compiled] = []
    with compiled_ahead(device, Announced(norms, WIDTHS), done.append):
        for turn in range(COPIES):
            for host in (arena.tensor, own):
                host.fill_(turn)
                near.copy_(host, non_blocking=True)
                wrong += int((near != turn).sum())
                near.fill_(turn + 1)
                host.copy_(near, non_blocking=True)
                torch.cuda.synchronize()
                wrong += int((host != turn + 1).sum())
    files = {path.parent for path in Path(knobs.cache.dir).rglob("*norm*.cubin")}
    same = []
    for width in WIDTHS:
        rows = x[:, :width].contiguous()
        found = ops.rms_norm(rows, rows[0], 1e-5)
        same.append(torch.allclose(found, reference.rms_norm(rows, rows[0], 1e-5), rtol=0.02, atol=0.02))
    new = {path.parent for path in Path(knobs.cache.dir).rglob("*norm*.cubin")} - files
    told = {"done": [asdict(each) for each in done], "wrong": wrong, "same": same, "files": len(files), "new": len(new)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
